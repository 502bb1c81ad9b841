"""The part of a reduction that crosses devices, inside `jax.shard_map` and `jax.pmap`."""

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["axes_of", "combine", "largest", "total_size"]


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
    # The second is its name in earlier releases of JAX.
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
      kind: how results are combined; for "max" none is negative.

    Returns:
      One result a group, the same on every device along those axes.
    """
    here: dict[tuple[Hashable, ...], dict[int, list[jax.Array]]] = {}
    for group, pairs in enumerate(partials):
        for value, axes in pairs:
            here.setdefault(axes, {}).setdefault(group, []).append(value)
    complete: list[list[jax.Array]] = [[] for _ in partials]
    for axes, groups in here.items():
        values = [_reduce(values, kind) for values in groups.values()]
        if axes and kind == "max":
            dtypes = [value.dtype for value in values]
            numbers = lax.pmax([_as_integers(value) for value in values], axes)
            values = list(map(lax.bitcast_convert_type, numbers, dtypes))
        elif axes:
            values = lax.psum(values, axes)
        for group, value in zip(groups, values, strict=True):
            complete[group].append(value)
    return [_reduce(values, kind) for values in complete]


def largest(magnitudes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The maximum, NaN where there is one, which XLA's own may lose on CPU and across devices.

    Args:
      magnitudes: floats without a sign.
      axes: of `magnitudes`, over which the maximum is taken.

    Returns:
      An array of the other axes, in the dtype of `magnitudes`.
    """
    return lax.bitcast_convert_type(
        lax.reduce_max(_as_integers(magnitudes), axes), magnitudes.dtype
    )


def _as_integers(magnitudes: jax.Array) -> jax.Array:
    """Integers in the order of the magnitudes they stand for, NaN above infinity (IEEE 754)."""
    dtype = np.dtype(f"int{8 * magnitudes.dtype.itemsize}")
    number = lax.bitcast_convert_type(magnitudes, dtype)
    # Without the sign that a NaN may have.
    return lax.bitwise_and(number, lax.full_like(number, jnp.iinfo(dtype).max))


def total_size(axes: tuple[Hashable, ...]) -> int:
    """The number of devices along `axes`, each of which holds a part of the leaf."""
    return math.prod(lax.axis_size(axis) for axis in axes)


def _reduce(values: Sequence[jax.Array], kind: str) -> jax.Array:
    if len(values) == 1:
        return values[0]
    # Not a chain of additions, nor what XLA fuses the values into: with thousands of them both
    # are slow to compile.
    stacked = lax.concatenate([lax.expand_dims(value, (0,)) for value in values], 0)
    stacked = lax.optimization_barrier(stacked)
    return largest(stacked, (0,)) if kind == "max" else lax.reduce_sum(stacked, (0,))
