"""Sums over groups that neither overflow nor underflow, for the price of plain ones."""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group, Member

__all__ = ["RANGES", "SafeSum", "complex_of", "count", "real_parts", "safe_sums", "with_mesh_axes"]


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


def safe_sums(norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[SafeSum]:
    """Each group's sum of squares or of absolute values, or its maximum.

    Accumulated in float32, or float64 where the group holds a float64 leaf; at a power-of-two
    scale where the sum of the elements themselves leaves the safe range. Needs no memory but for
    numbers.

    Args:
      norm: "l2" for squares, "l1" for absolute values, "linf" for the maximum.
      groups: from `groups.assign`.
      leaves: the arrays that the groups' members index.

    Returns:
      One `SafeSum` a group.
    """
    if not groups:
        return []
    sums = lax.platform_dependent(
        list(leaves),
        cpu=functools.partial(_with_rescue, norm, groups),
        default=functools.partial(_at_every_scale, norm, groups),
    )
    return [SafeSum(*pair) for pair in sums]


def _at_every_scale(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[tuple[jax.Array, jax.Array]]:
    """Takes each sum at three scales in one pass and picks the safe one, as Blue (1978).

    On GPU and TPU the pass waits for memory, not for arithmetic. A branch would cost more: a GPU
    waits for its condition, and a TPU reads again what it held on the chip.
    """
    ranges = [RANGES[_accumulator(group, leaves)] for group in groups]
    choices = [[safe.up for safe in ranges]] if norm == "l2" else []
    choices += [[1.0] * len(groups), [safe.down for safe in ranges]]
    # All of them cross the devices together.
    partials = [x for scales in choices for x in _partials(norm, groups, leaves, scales)]
    sums = mesh.combine(partials, "max" if norm == "linf" else "sum")
    *ups, ones, downs = (sums[i : i + len(groups)] for i in range(0, len(sums), len(groups)))
    results = []
    for i, group in enumerate(groups):
        scale = _scale(norm, ones[i], count(group, leaves))
        one = lax.full_like(scale, 1)
        total = lax.select(lax.lt(scale, one), downs[i], ones[i])
        for up in ups:
            total = lax.select(lax.gt(scale, one), up[i], total)
        results.append((total, scale))
    return results


def _with_rescue(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[tuple[jax.Array, jax.Array]]:
    """Takes each sum, and once more where it left the safe range: on CPU arithmetic costs time."""
    kind = "max" if norm == "linf" else "sum"
    sums = mesh.combine(_partials(norm, groups, leaves, [1.0] * len(groups)), kind)
    results = []
    # A check for all groups would wait for all sums, and by then a leaf that is to be scaled has
    # left the cache.
    for group, total in zip(groups, sums, strict=True):
        scale = _scale(norm, total, count(group, leaves))
        total = lax.cond(
            jnp.all(scale == 1),
            lambda total=total: total,
            lambda group=group, scale=scale: mesh.combine(
                _partials(norm, [group], leaves, [scale]), kind
            )[0],
        )
        results.append((total, scale))
    return results


def _partials(
    norm: str,
    groups: Sequence[Group],
    leaves: Sequence[jax.Array],
    scales: Sequence[jax.Array | float],
) -> list[list[tuple[jax.Array, tuple[Hashable, ...]]]]:
    """What each leaf on this device has of its group's sum, for `mesh.combine`."""
    partials = []
    for group, scale in zip(groups, scales, strict=True):
        dtype = _accumulator(group, leaves)
        values = [_partial(norm, leaves[m.leaf], m.axes, dtype, scale) for m in group.members]
        partials.append(with_mesh_axes(group, values))
    return partials


def _partial(
    norm: str, x: jax.Array, axes: tuple[int, ...], dtype: np.dtype, scale: jax.Array | float
) -> jax.Array:
    if isinstance(scale, jax.Array):
        # Tied to the leaf, for leaves of one shape that shared a scale would also share its
        # broadcast: a temporary of their size. And of a leaf that XLA knows it would square the
        # scale first, which leaves the range.
        scale, x = lax.optimization_barrier((scale, x))
        parts = [lax.mul(part, lax.expand_dims(scale, axes)) for part in real_parts(x, dtype)]
    elif scale == 1:
        parts = real_parts(x, dtype)
    else:
        parts = [lax.mul(part, lax.full_like(part, scale)) for part in real_parts(x, dtype)]
        if norm == "l2":
            # Bounded for the same reason.
            bound = float(jnp.finfo(dtype).max)
            parts = [lax.min(part, lax.full_like(part, bound)) for part in parts]
    if norm == "l2":
        squares = [lax.mul(part, part) for part in parts]
        return lax.reduce_sum(squares[0] if len(parts) == 1 else lax.add(*squares), axes)
    reduce = lax.reduce_max if norm == "linf" else lax.reduce_sum
    return reduce(lax.abs(complex_of(parts)), axes)


def _scale(norm: str, total: jax.Array, count: int) -> jax.Array:
    """The power of two at which to take `total` instead, 1 where it is good as it is."""
    safe = RANGES[total.dtype]
    up, one, down = (lax.full_like(total, choice) for choice in (safe.up, 1, safe.down))
    # NaN is not below the ceiling and goes the way of what is too large.
    scale = lax.select(total <= safe.huge, one, down)
    # Only squares underflow.
    return lax.select(total < count * safe.tiny, up, scale) if norm == "l2" else scale


def _accumulator(group: Group, leaves: Sequence[jax.Array]) -> np.dtype:
    dtypes = {jnp.finfo(leaves[member.leaf].dtype).dtype for member in group.members}
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def with_mesh_axes(
    group: Group, values: Sequence[jax.Array]
) -> list[tuple[jax.Array, tuple[Hashable, ...]]]:
    """One value a member, each with the mesh axes over which it is still split."""
    pairs = zip(values, group.members, strict=True)
    return [(value, mesh.axes_of(value, member.mesh_axes)) for value, member in pairs]


def count(group: Group, leaves: Sequence[jax.Array]) -> int:
    """The number of elements that share each norm of the group, on all devices."""
    return sum(_elements(leaves[member.leaf], member) for member in group.members)


def real_parts(x: jax.Array, dtype: np.dtype) -> list[jax.Array]:
    """The array, or its real and imaginary parts, in another dtype."""
    parts = [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    return [lax.convert_element_type(part, dtype) for part in parts]


def complex_of(parts: Sequence[jax.Array]) -> jax.Array:
    """Undoes `real_parts`."""
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _elements(x: jax.Array, member: Member) -> int:
    here = math.prod(x.shape[axis] for axis in member.axes)
    return here * mesh.total_size(mesh.axes_of(x, member.mesh_axes))
