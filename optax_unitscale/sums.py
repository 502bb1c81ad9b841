"""Sums over groups that neither overflow nor underflow, for the price of plain ones."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group
from optax_unitscale.leaves import (
    accumulator,
    count,
    opaque,
    real_parts,
    renumbered,
    with_mesh_axes,
)
from optax_unitscale.partials import group_partials, kind_of, sum_of

__all__ = ["RANGES", "SafeSum", "sums_at_every_scale", "sums_with_rescue"]


class SafeSum(NamedTuple):
    """The sum of elements that were multiplied by `scale`: a power of two, 1 for the most part."""

    total: jax.Array
    scale: jax.Array


class _Range(NamedTuple):
    """The safe range of a sum, and the powers of two at which one outside it is taken instead.

    Below `tiny` per element, squares that were flushed to zero can matter at the dtype's precision:
    `tiny` is smallest normal / epsilon. Above `huge`, the reciprocal of the sum, by which XLA may
    multiply instead of dividing, is near to being flushed. `up` lifts the squares of all that is
    so small into the range; `down` brings those of all that is finite into it.
    """

    tiny: float
    huge: float
    up: float
    down: float


RANGES = {
    np.dtype(np.float32): _Range(2.0**-102, 2.0**120, 2.0**80, 2.0**-100),
    np.dtype(np.float64): _Range(2.0**-969, 2.0**1016, 2.0**600, 2.0**-600),
}


def sums_at_every_scale(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[SafeSum]:
    """Takes each sum at three scales in one pass and picks the safe one, as Blue (1978).

    On GPU and TPU the pass waits for memory, not for arithmetic. A branch would cost more: a GPU
    waits for its condition, and a TPU reads again what it held on the chip.

    Args:
      norm: "l2" for squares, "l1" for absolute values, "linf" for the maximum.
      groups: from `groups.assign`.
      leaves: the arrays that the groups' members index.

    Returns:
      One `SafeSum` a group, in float32, or float64 where the group holds a float64 leaf.
    """
    ranges = [RANGES[accumulator(group, leaves)] for group in groups]
    choices = [(safe.up, 1.0, safe.down) if norm == "l2" else (1.0, safe.down) for safe in ranges]
    taken = []
    for group, scales in zip(groups, choices, strict=True):
        dtype = accumulator(group, leaves)
        sums = [_sums_at(norm, leaves[m.leaf], m.axes, dtype, scales) for m in group.members]
        taken += [with_mesh_axes(group, values) for values in zip(*sums, strict=True)]
    # All of them cross the devices together.
    totals = iter(mesh.combine(taken, kind_of(norm)))
    return [
        _pick(norm, count(group, leaves), [next(totals) for _ in scales])
        for group, scales in zip(groups, choices, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("norm", "count"))
def _pick(norm: str, count: int, taken: Sequence[jax.Array]) -> SafeSum:
    *ups, one, down = taken
    scale = _safe_scale(norm, one, count)
    unit = lax.full_like(scale, 1)
    total = lax.select(lax.lt(scale, unit), down, one)
    for up in ups:
        total = lax.select(lax.gt(scale, unit), up, total)
    # The bound on what is squared can lose a NaN.
    return SafeSum(lax.select(lax.ne(one, one), one, total), scale)


def sums_with_rescue(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[SafeSum]:
    """Takes each sum, and once more where it left the safe range: on CPU arithmetic costs time.

    Args and Returns: as `sums_at_every_scale`.
    """
    taken = [group_partials(norm, group, leaves, accumulator(group, leaves)) for group in groups]
    sums = mesh.combine(taken, kind_of(norm))
    # A check for all groups would wait for all sums, and by then a leaf that is to be scaled has
    # left the cache.
    return [
        _check(norm, *renumbered(group, leaves), total)
        for group, total in zip(groups, sums, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("norm", "groups"))
def _check(
    norm: str, groups: tuple[Group], leaves: Sequence[jax.Array], total: jax.Array
) -> SafeSum:
    (group,) = groups
    scale = _safe_scale(norm, total, count(group, leaves))

    def rescue() -> jax.Array:
        dtype = accumulator(group, leaves)
        partials = group_partials(norm, group, leaves, dtype, scale)
        return mesh.combine([partials], kind_of(norm))[0]

    return SafeSum(lax.cond(jnp.all(scale == 1), lambda: total, rescue), scale)


# Compiled into the caller like the rest; `jax.jit` spares tracing it again for each leaf.
@functools.partial(jax.jit, static_argnames=("norm", "axes", "dtype", "scales"))
def _sums_at(
    norm: str, x: jax.Array, axes: tuple[int, ...], dtype: np.dtype, scales: tuple[float, ...]
) -> list[jax.Array]:
    sums = []
    for scale in scales:
        parts = [opaque(part) for part in real_parts(x, dtype)]
        if scale != 1:
            parts = [opaque(lax.mul(part, lax.full_like(part, scale))) for part in parts]
        sums.append(sum_of(norm, parts, axes))
    return sums


def _safe_scale(norm: str, total: jax.Array, count: int) -> jax.Array:
    """The power of two at which to take `total` instead, 1 where it is good as it is."""
    safe = RANGES[total.dtype]
    up, one, down = (lax.full_like(total, choice) for choice in (safe.up, 1, safe.down))
    # NaN is not below the ceiling and goes the way of what is too large.
    scale = lax.select(total <= safe.huge, one, down)
    # Only squares underflow.
    return lax.select(total < count * safe.tiny, up, scale) if norm == "l2" else scale
