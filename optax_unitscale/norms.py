"""The four norms: a reduction that neither overflows nor underflows, its finish, its derivative."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group, Member

__all__ = ["ScaledNorm", "divide", "group_norms"]


class ScaledNorm(NamedTuple):
    """A group's norm as `value / factor`, so that a norm beyond the dtype's range is still held.

    `factor` is 1 unless the norm's square is huge. Both have the shape of the kept axes.
    """

    value: jax.Array
    factor: jax.Array


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
        return norms, [
            ScaledNorm(_slope(norm, group, by, leaves, slopes), jnp.zeros_like(by.factor))
            for group, by in zip(groups, norms, strict=True)
        ]

    return values(leaves)


def divide(x: jax.Array, by: ScaledNorm, axes: tuple[int, ...]) -> jax.Array:
    """One leaf over its norm, in the norm's dtype, rounded once to the leaf's; 0 where it is 0."""
    usable = by.value != 0
    value = jnp.expand_dims(jnp.where(usable, by.value, 1), axes)
    factor = jnp.expand_dims(jnp.where(usable, by.factor, 0), axes)
    parts = [part * factor / value for part in _parts(x, by.value.dtype)]
    return (lax.complex(*parts) if len(parts) == 2 else parts[0]).astype(x.dtype)


def _safe_norms(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[ScaledNorm]:
    partials = [_partials(norm, group, leaves) for group in groups]
    sums = [_combine(norm, g, p) for g, p in zip(groups, partials, strict=True)]
    counts = [_count(group, leaves) for group in groups]
    scales = [_scale(norm, total, n) for total, n in zip(sums, counts, strict=True)]

    def keep(leaves, partials, sums, scales):
        del leaves, partials, scales
        return sums

    def again(leaves, partials, sums, scales):
        redone = [
            _combine(norm, group, _rescale(norm, group, leaves, old, scale))
            for group, old, scale in zip(groups, partials, scales, strict=True)
        ]
        return [
            jnp.where(scale == 1, total, new)
            for total, new, scale in zip(sums, redone, scales, strict=True)
        ]

    # One check for all groups, and only norms as its result: no temporary the size of a leaf.
    unsafe = jnp.stack([jnp.any(scale != 1) for scale in scales])
    sums = lax.cond(jnp.any(unsafe), again, keep, list(leaves), partials, sums, scales)
    norms = []
    for total, count, scale in zip(sums, counts, scales, strict=True):
        factor = jnp.where(scale < 1, _HUGE_FACTOR, 1).astype(scale.dtype)
        norms.append(ScaledNorm(_finish(norm, total, count) * (factor / scale), factor))
    return norms


def _partials(norm: str, group: Group, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    dtype = _accumulator(group, leaves)
    return [_partial(norm, leaves[m.leaf], m.axes, dtype) for m in group.members]


def _partial(
    norm: str, x: jax.Array, axes: tuple[int, ...], dtype: np.dtype, scale: jax.Array | None = None
) -> jax.Array:
    """One leaf's sum of squares or of absolute values, or its maximum, after times `scale`."""
    parts = _parts(x, dtype)
    if scale is not None:
        parts = [part * jnp.expand_dims(scale, axes) for part in parts]
    if norm in ("l2", "rms"):
        return jnp.sum(sum((part * part for part in parts[1:]), parts[0] * parts[0]), axis=axes)
    sizes = jnp.abs(lax.complex(*parts) if len(parts) == 2 else parts[0])
    return jnp.max(sizes, axis=axes) if norm == "linf" else jnp.sum(sizes, axis=axes)


def _rescale(
    norm: str,
    group: Group,
    leaves: Sequence[jax.Array],
    partials: Sequence[jax.Array],
    scale: jax.Array,
) -> list[jax.Array]:
    """The partial results of a group's leaves, taken again and brought to the group's scale.

    Each leaf is read at a scale of its own, for leaves of one shape that shared a scale would also
    share its broadcast: a temporary of their size.
    """
    redone = []
    for member, partial in zip(group.members, partials, strict=True):
        x = leaves[member.leaf]
        own = _scale(norm, partial, math.prod(x.shape[axis] for axis in member.axes))
        to_group = scale / own
        new = _partial(norm, x, member.axes, partial.dtype, own) * to_group
        redone.append(new * to_group if norm in ("l2", "rms") else new)
    return redone


def _combine(norm: str, group: Group, partials: Sequence[jax.Array]) -> jax.Array:
    axes = [
        mesh.axes_of(partial, member.mesh_axes)
        for member, partial in zip(group.members, partials, strict=True)
    ]
    pairs = list(zip(partials, axes, strict=True))
    return mesh.reduce_over(pairs, "max" if norm == "linf" else "sum")


def _scale(norm: str, total: jax.Array, count: int) -> jax.Array:
    """The power of two at which to take `total` again, 1 where it is good as it is."""
    safe = _RANGES[total.dtype]
    # Only squares underflow. NaN is not below the floor and goes the way of what is too large.
    floor = count * safe.tiny if norm in ("l2", "rms") else 0.0
    scale = jnp.where(total < floor, safe.up, jnp.where(total <= safe.huge, 1, safe.down))
    return scale.astype(total.dtype)


def _finish(norm: str, total: jax.Array, count: int) -> jax.Array:
    if norm == "l2":
        return jnp.sqrt(total)
    if norm == "rms":
        return jnp.sqrt(total / count)
    return total


def _slope(
    norm: str,
    group: Group,
    by: ScaledNorm,
    leaves: Sequence[jax.Array],
    slopes: Sequence[jax.Array],
) -> jax.Array:
    """The derivative of `by.value` along `slopes`: the group's sum of dual * slope."""
    dtype = by.value.dtype
    partials, ties = [], []
    for member in group.members:
        x = leaves[member.leaf]
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        if norm in ("l2", "rms"):
            dual = _parts(divide(x, by, member.axes), dtype)
        else:
            dual = _parts(jnp.sign(x), dtype)
        if norm == "linf":
            largest = jnp.expand_dims(by.value / by.factor, member.axes)
            hit = (jnp.abs(x) == largest).astype(dtype)
            dual = [part * hit for part in dual]
            count = jnp.sum(hit, axis=member.axes)
            ties.append((count, mesh.axes_of(count, member.mesh_axes)))
        along = _parts(slopes[member.leaf], dtype)
        products = [d * s for d, s in zip(dual, along, strict=True)]
        partial = jnp.sum(sum(products[1:], products[0]), axis=member.axes)
        partials.append((partial, mesh.axes_of(partial, member.mesh_axes)))
    slope = mesh.reduce_over(partials, "sum") * by.factor
    if norm == "rms":
        return slope / _count(group, leaves)
    if norm == "linf":
        return slope / mesh.reduce_over(ties, "sum")
    return slope


def _accumulator(group: Group, leaves: Sequence[jax.Array]) -> np.dtype:
    dtypes = {jnp.finfo(leaves[member.leaf].dtype).dtype for member in group.members}
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def _parts(x: jax.Array, dtype: np.dtype) -> list[jax.Array]:
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    return [part.astype(dtype) for part in parts]


def _count(group: Group, leaves: Sequence[jax.Array]) -> int:
    """The number of elements that share each norm of the group, on all devices."""
    return sum(_elements(leaves[member.leaf], member) for member in group.members)


def _elements(x: jax.Array, member: Member) -> int:
    here = math.prod(x.shape[axis] for axis in member.axes)
    return here * mesh.total_size(mesh.axes_of(x, member.mesh_axes))
