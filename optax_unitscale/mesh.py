"""The part of a reduction that crosses devices, inside `jax.shard_map` and `jax.pmap`."""

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["axes_of", "combine", "total_size"]


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


def combine(
    partials: Sequence[Sequence[tuple[jax.Array, tuple[Hashable, ...]]]],
    kind: Literal["sum", "max"],
) -> list[jax.Array]:
    """Combines the partial results of each group's leaves within and across devices.

    All that is split over the same mesh axes travels together, so that each set of axes costs one
    collective.

    Args:
      partials: for each group, pairs of a partial result and the mesh axes over which it is still
        split; within a group, all of one shape.
      kind: how results are combined.

    Returns:
      One result a group, the same on every device along those axes.
    """
    collective = lax.pmax if kind == "max" else lax.psum
    here: dict[tuple[Hashable, ...], dict[int, list[jax.Array]]] = {}
    for group, pairs in enumerate(partials):
        for value, axes in pairs:
            here.setdefault(axes, {}).setdefault(group, []).append(value)
    complete: list[list[jax.Array]] = [[] for _ in partials]
    for axes, groups in here.items():
        values = [_reduce(values, kind) for values in groups.values()]
        if axes and kind == "max":
            # A maximum over devices may lose a NaN, but no infinity, which ends as one too.
            values = [jnp.where(jnp.isnan(value), jnp.inf, value) for value in values]
        for group, value in zip(groups, collective(values, axes) if axes else values, strict=True):
            complete[group].append(value)
    return [_reduce(values, kind) for values in complete]


def total_size(axes: tuple[Hashable, ...]) -> int:
    """The number of devices along `axes`, each of which holds a part of the leaf."""
    return math.prod(lax.psum(1, axis) for axis in axes)


def _reduce(values: Sequence[jax.Array], kind: str) -> jax.Array:
    # Not a chain of additions, which XLA is slow to compile where there are thousands.
    if len(values) == 1:
        return values[0]

    stacked = lax.concatenate([lax.expand_dims(value, (0,)) for value in values], 0)
    stacked = lax.optimization_barrier(stacked)
    total = lax.reduce_sum(stacked, (0,))
    if kind == "sum":
        return total
    # As in a leaf, XLA's maximum can lose a NaN; none of these is negative.
    return lax.select(lax.ne(total, total), total, lax.reduce_max(stacked, (0,)))
