"""The four norms: a reduction that neither overflows nor underflows, its finish, its derivative."""

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

__all__ = ["Divisor", "ScaledNorm", "divide", "divisor", "group_norms"]


class ScaledNorm(NamedTuple):
    """A norm as `value / factor`, so that one beyond the dtype's range is still held.

    `factor` is 1 unless the norm's square is huge.
    """

    value: jax.Array
    factor: jax.Array


class Divisor(NamedTuple):
    """A norm to divide by: times `factor`, over `value`.

    `inverse` says both in one number: 1 / value, 0 where `factor` is 0, and negative where it is
    less than 1. Made by a division after all other arithmetic, it is all that XLA's loop over a
    leaf waits for; a loop that reads two numbers takes a fifth longer on CPU.
    """

    value: jax.Array
    factor: jax.Array
    inverse: jax.Array


class _Range(NamedTuple):
    """The safe range of a sum, and the powers of two at which one outside it is taken again.

    Below `tiny` per element, squares that were flushed to zero can matter at the dtype's precision:
    `tiny` is smallest normal / epsilon. Above `huge`, the reciprocal of the sum, by which XLA may
    multiply instead of dividing, is near to being flushed. `up` lifts the squares of all that is
    so small into the range; `down` brings those of all that is finite into it.
    """

    tiny: float
    huge: float
    up: float
    down: float


_RANGES = {
    np.dtype(np.float32): _Range(2.0**-102, 2.0**120, 2.0**80, 2.0**-100),
    np.dtype(np.float64): _Range(2.0**-969, 2.0**1016, 2.0**600, 2.0**-600),
}
_HUGE_FACTOR = 2.0**-40


def group_norms(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[ScaledNorm]:
    """The norm of every group, exact over the whole range of the dtype.

    Sums are accumulated in float32, or float64 where the group holds a float64 leaf. One reduction
    per leaf; groups whose sum left the safe range are reduced again at a power-of-two scale.
    The derivative is that of the norm, and 0 where the norm is 0.

    Args:
      norm: "l2", "rms", "l1" or "linf".
      groups: from `groups.assign`.
      leaves: the arrays that the groups' members index.

    Returns:
      One `ScaledNorm` a group.
    """

    @jax.custom_jvp
    def values(leaves: Sequence[jax.Array]) -> list[ScaledNorm]:
        return _safe_norms(norm, groups, leaves)

    @values.defjvp
    def _(primals, tangents):
        (leaves,), (slopes,) = primals, tangents
        norms = values(leaves)
        along = _slopes(norm, groups, norms, leaves, slopes)
        return norms, [ScaledNorm(slope, jnp.zeros_like(slope)) for slope in along]

    return values(leaves)


def divisor(by: ScaledNorm) -> Divisor:
    """Prepares to divide by a norm; dividing by 0 gives 0."""
    is_zero = by.value == 0
    value = jnp.where(is_zero, 1, by.value)
    factor = jnp.where(is_zero, 0, by.factor)
    sign = jnp.where(is_zero, 0, jnp.where(by.factor < 1, -1, 1)).astype(value.dtype)
    return Divisor(value, factor, sign / value)


def divide(x: jax.Array, by: Divisor, axes: tuple[int, ...]) -> jax.Array:
    """One leaf over its norm, in the norm's dtype, rounded once to the leaf's.

    Args:
      x: the leaf.
      by: its norm.
      axes: the axes of `x` over which the norm ran.

    Returns:
      The quotient, of the leaf's shape and dtype.
    """
    parts = _parts(x, by.value.dtype)
    if x.size == 1:
        # A number over its own magnitude is exactly 1.
        value, factor = lax.expand_dims(by.value, axes), lax.expand_dims(by.factor, axes)
        parts = [lax.div(lax.mul(part, factor), value) for part in parts]
    else:
        is_huge = lax.lt(by.inverse, lax.full_like(by.inverse, 0))
        factor = jnp.where(is_huge, _HUGE_FACTOR, 1).astype(by.inverse.dtype)
        factor, inverse = lax.expand_dims(factor, axes), lax.expand_dims(abs(by.inverse), axes)
        parts = [lax.mul(lax.mul(part, factor), inverse) for part in parts]
    return lax.convert_element_type(_join(parts), x.dtype)


def _safe_norms(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[ScaledNorm]:
    if not groups:
        return []
    counts = [_count(group, leaves) for group in groups]
    sums = _sums(norm, groups, leaves)
    scales = [_scale(norm, total, count) for total, count in zip(sums, counts, strict=True)]

    def retake(batches, leaves, sums, scales):
        totals = {}
        for batch in batches:
            used = {member.leaf for i in batch for member in groups[i].members}
            chosen = lax.cond(
                _all_safe(norm, [sums[i] for i in batch], [counts[i] for i in batch]),
                lambda leaves, sums, scales: sums,
                lambda leaves, sums, scales, b=batch: _sums(
                    norm, [groups[i] for i in b], leaves, scales
                ),
                [x if i in used else None for i, x in enumerate(leaves)],
                [sums[i] for i in batch],
                [scales[i] for i in batch],
            )
            totals.update(zip(batch, chosen, strict=True))
        return [totals[i] for i in range(len(groups))]

    # On GPU every check is a wait for the device. On CPU a check for several leaves waits for all
    # their norms, and a large leaf has left the cache when it is scaled.
    totals = lax.platform_dependent(
        list(leaves),
        sums,
        scales,
        cpu=functools.partial(retake, [[i] for i in range(len(groups))]),
        default=functools.partial(retake, _batches(groups, leaves)),
    )
    norms = []
    for total, count, scale in zip(totals, counts, scales, strict=True):
        safe = _RANGES[total.dtype]
        one = lax.full_like(scale, 1)
        is_huge = lax.lt(scale, one)
        factor = lax.select(is_huge, lax.full_like(scale, _HUGE_FACTOR), one)
        undo_down = lax.full_like(scale, _HUGE_FACTOR / safe.down)
        undo_up = lax.full_like(scale, 1 / safe.up)
        undo = lax.select(is_huge, undo_down, lax.select(lax.eq(scale, one), one, undo_up))
        norms.append(ScaledNorm(lax.mul(_finish(norm, total, count), undo), factor))
    return norms


def _sums(
    norm: str,
    groups: Sequence[Group],
    leaves: Sequence[jax.Array],
    scales: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Each group's sum of squares or of absolute values, or its maximum, after times `scales`."""
    partials = []
    for i, group in enumerate(groups):
        dtype = _accumulator(group, leaves)
        scale = None if scales is None else scales[i]
        values = [_partial(norm, leaves[m.leaf], m.axes, dtype, scale) for m in group.members]
        partials.append(_with_axes(group, values))
    return mesh.combine(partials, "max" if norm == "linf" else "sum")


def _partial(
    norm: str, x: jax.Array, axes: tuple[int, ...], dtype: np.dtype, scale: jax.Array | None
) -> jax.Array:
    parts = _parts(x, dtype)
    if scale is not None:
        # Tied to the leaf, for leaves of one shape that shared a scale would also share its
        # broadcast: a temporary of their size.
        own, _ = lax.optimization_barrier((scale, x))
        parts = [lax.mul(part, lax.expand_dims(own, axes)) for part in parts]
    if norm in ("l2", "rms"):
        squares = [lax.mul(part, part) for part in parts]
        return lax.reduce_sum(squares[0] if len(parts) == 1 else lax.add(*squares), axes)
    reduce = lax.reduce_max if norm == "linf" else lax.reduce_sum
    return reduce(lax.abs(_join(parts)), axes)


def _with_axes(
    group: Group, values: Sequence[jax.Array]
) -> list[tuple[jax.Array, tuple[Hashable, ...]]]:
    pairs = zip(values, group.members, strict=True)
    return [(value, mesh.axes_of(value, member.mesh_axes)) for value, member in pairs]


def _batches(groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[list[int]]:
    """Groups that cross the same mesh axes: devices must agree on what they do together."""
    batches: dict[frozenset[Hashable], list[int]] = {}
    for i, group in enumerate(groups):
        axes = [mesh.axes_of(leaves[m.leaf], m.mesh_axes) for m in group.members]
        batches.setdefault(frozenset().union(*axes), []).append(i)
    return list(batches.values())


def _all_safe(norm: str, sums: Sequence[jax.Array], counts: Sequence[int]) -> jax.Array:
    """Whether no sum must be taken again. Numbers are stacked, or XLA compiles for minutes."""
    stacks: dict[object, list[tuple[jax.Array, int]]] = {}
    for i, (total, count) in enumerate(zip(sums, counts, strict=True)):
        stacks.setdefault(i if total.ndim else total.dtype, []).append((total, count))
    checks = []
    for pairs in stacks.values():
        total = jnp.stack([total for total, _ in pairs])
        count = np.reshape([count for _, count in pairs], (-1, *(1,) * (total.ndim - 1)))
        floor, ceiling = _limits(norm, total.dtype, count)
        checks.append(jnp.all((total >= floor) & (total <= ceiling)))
    return functools.reduce(lax.bitwise_and, checks)


def _scale(norm: str, total: jax.Array, count: int) -> jax.Array:
    """The power of two at which to take `total` again, 1 where it is good as it is."""
    safe = _RANGES[total.dtype]
    floor, ceiling = _limits(norm, total.dtype, count)
    up, one, down = (lax.full_like(total, choice) for choice in (safe.up, 1, safe.down))
    # NaN is not below the floor and goes the way of what is too large.
    return jnp.where(total < floor, up, lax.select(total <= ceiling, one, down))


def _limits(norm: str, dtype: np.dtype, count: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    safe = _RANGES[dtype]
    # Only squares underflow.
    floor = count * safe.tiny if norm in ("l2", "rms") else 0.0
    return np.asarray(floor, dtype), np.asarray(safe.huge, dtype)


def _finish(norm: str, total: jax.Array, count: int) -> jax.Array:
    if norm == "l2":
        return jnp.sqrt(total)
    if norm == "rms":
        return jnp.sqrt(total / count)
    return total


def _slopes(
    norm: str,
    groups: Sequence[Group],
    norms: Sequence[ScaledNorm],
    leaves: Sequence[jax.Array],
    slopes: Sequence[jax.Array],
) -> list[jax.Array]:
    """The derivative of each group's value along `slopes`: its sum of dual * slope."""
    partials, ties = [], []
    for group, by in zip(groups, norms, strict=True):
        dtype = by.value.dtype
        sums, hits = [], []
        for member in group.members:
            x = leaves[member.leaf]
            x = x.astype(jnp.promote_types(x.dtype, dtype))
            if norm in ("l2", "rms"):
                dual = _parts(divide(x, divisor(by), member.axes), dtype)
            else:
                dual = _parts(jnp.sign(x), dtype)
            if norm == "linf":
                largest = jnp.expand_dims(by.value / by.factor, member.axes)
                hit = (jnp.abs(x) == largest).astype(dtype)
                dual = [part * hit for part in dual]
                hits.append(jnp.sum(hit, axis=member.axes))
            along = _parts(slopes[member.leaf], dtype)
            products = [d * s for d, s in zip(dual, along, strict=True)]
            sums.append(jnp.sum(sum(products[1:], products[0]), axis=member.axes))
        partials.append(_with_axes(group, sums))
        ties.append(_with_axes(group, hits) if hits else [])
    totals = mesh.combine(partials, "sum")
    if norm == "linf":
        shares = mesh.combine(ties, "sum")
    else:
        shares = [_count(group, leaves) if norm == "rms" else 1 for group in groups]
    return [
        total * by.factor / share for total, by, share in zip(totals, norms, shares, strict=True)
    ]


def _accumulator(group: Group, leaves: Sequence[jax.Array]) -> np.dtype:
    dtypes = {jnp.finfo(leaves[member.leaf].dtype).dtype for member in group.members}
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def _parts(x: jax.Array, dtype: np.dtype) -> list[jax.Array]:
    parts = [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    return [lax.convert_element_type(part, dtype) for part in parts]


def _join(parts: Sequence[jax.Array]) -> jax.Array:
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _count(group: Group, leaves: Sequence[jax.Array]) -> int:
    """The number of elements that share each norm of the group, on all devices."""
    return sum(_elements(leaves[member.leaf], member) for member in group.members)


def _elements(x: jax.Array, member: Member) -> int:
    here = math.prod(x.shape[axis] for axis in member.axes)
    return here * mesh.total_size(mesh.axes_of(x, member.mesh_axes))
