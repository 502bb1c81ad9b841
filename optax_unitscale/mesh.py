"""The part of a reduction that crosses devices, inside `jax.shard_map` and `jax.pmap`."""

import math
from collections.abc import Hashable, Sequence

import jax
from jax import lax

__all__ = ["axes_of", "reduce_over", "total_size"]


def axes_of(x: jax.Array, mesh_axes: tuple[Hashable, ...] | None) -> tuple[Hashable, ...]:
    """The mesh axes that a leaf is split over: those given, or those that JAX knows of.

    JAX knows only inside `jax.shard_map` with `check_vma=True`; elsewhere the answer is ().

    Args:
      x: a leaf, or what was computed from it.
      mesh_axes: what the user said, or None.

    Returns:
      The axis names, in an order that is the same for every leaf.
    """
    if mesh_axes is not None:
        return mesh_axes
    aval = jax.typeof(x)
    varying = aval.mat.varying if hasattr(aval, "mat") else aval.vma
    return tuple(sorted(varying, key=str))


def reduce_over(partials: Sequence[tuple[jax.Array, tuple[Hashable, ...]]], kind: str) -> jax.Array:
    """Combines the partial results of a group's leaves within and across devices.

    Leaves that are split over the same mesh axes are combined first, so that each set of axes costs
    one collective.

    Args:
      partials: pairs of a partial result and the mesh axes over which it is still split.
      kind: "sum" or "max".

    Returns:
      The combined result, the same on every device along those axes.
    """
    combine, collective = (lax.max, lax.pmax) if kind == "max" else (lax.add, lax.psum)
    by_axes: dict[tuple[Hashable, ...], jax.Array] = {}
    for value, axes in partials:
        by_axes[axes] = combine(by_axes[axes], value) if axes in by_axes else value
    total = None
    for axes, value in by_axes.items():
        complete = collective(value, axes) if axes else value
        total = complete if total is None else combine(total, complete)
    assert total is not None, "a group has at least one member"
    return total


def total_size(axes: tuple[Hashable, ...]) -> int:
    """The number of devices along `axes`, each of which holds a part of the leaf."""
    return math.prod(lax.psum(1, axis) for axis in axes)
