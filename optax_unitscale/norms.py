"""The four norms: a reduction that neither overflows nor underflows, its finish, its derivative."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group, Member

__all__ = ["ScaledNorm", "divide", "group_norms"]


class ScaledNorm(NamedTuple):
    """A group's norm as `value / factor`, so that a norm beyond the dtype's range is still held.

    `factor` is 1 unless the squares of the group overflow. Both have the shape of the kept axes.
    """

    value: jax.Array
    factor: jax.Array


class _Range(NamedTuple):
    """The powers of two with which a sum that left the safe range is taken again.

    Below `tiny` per element, squares that were flushed to zero can matter at the dtype's precision:
    `tiny` is smallest normal / epsilon. `up` lifts the squares of everything that small into
    the range, `down` brings the squares of everything finite into it, and `factor` does so for the
    norm itself.
    """

    tiny: float
    up: float
    down: float
    factor: float


_RANGES = {
    jnp.dtype(jnp.float32): _Range(2.0**-102, 2.0**80, 2.0**-100, 2.0**-40),
    jnp.dtype(jnp.float64): _Range(2.0**-969, 2.0**600, 2.0**-600, 2.0**-40),
}


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
            ScaledNorm(_slope(norm, group, n, leaves, slopes), jnp.zeros_like(n.factor))
            for group, n in zip(groups, norms, strict=True)
        ]

    return values(leaves)


def divide(x: jax.Array, by: ScaledNorm, axes: tuple[int, ...]) -> jax.Array:
    """x / norm for one leaf, in the norm's dtype and rounded once to the leaf's; 0 where it is 0.

    A true division: the reciprocal of a norm above 2**126 would be flushed to zero.
    """
    usable = by.value != 0
    value = jnp.expand_dims(jnp.where(usable, by.value, 1), axes)
    factor = jnp.expand_dims(jnp.where(usable, by.factor, 0), axes)
    parts = [part * factor / value for part in _parts(x, by.value.dtype)]
    return (lax.complex(*parts) if len(parts) == 2 else parts[0]).astype(x.dtype)


def _safe_norms(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[ScaledNorm]:
    sums = [_total(norm, group, leaves) for group in groups]
    if norm == "linf":
        return [ScaledNorm(total, jnp.ones_like(total)) for total in sums]
    ranges = [_RANGES[total.dtype] for total in sums]
    # A sum of absolute values cannot underflow.
    floors = [
        0.0 if norm == "l1" else _count(group, leaves) * r.tiny
        for group, r in zip(groups, ranges, strict=True)
    ]
    small = [total < floor for total, floor in zip(sums, floors, strict=True)]
    # Not `total > maximum`: NaN belongs here too.
    large = [~(total <= jnp.finfo(total.dtype).max) for total in sums]
    scales = [
        jnp.where(s, r.up, jnp.where(g, r.down, 1)).astype(total.dtype)
        for s, g, r, total in zip(small, large, ranges, sums, strict=True)
    ]

    def again(leaves, scales, sums):
        del sums
        return [_total(norm, g, leaves, s) for g, s in zip(groups, scales, strict=True)]

    def keep(leaves, scales, sums):
        del leaves, scales
        return sums

    # One check for all groups, and scalars as its only result: no temporary the size of a leaf.
    unsafe = jnp.stack([jnp.any(s | g) for s, g in zip(small, large, strict=True)])
    totals = lax.cond(jnp.any(unsafe), again, keep, list(leaves), scales, sums)
    norms = []
    for group, total, s, g, r in zip(groups, totals, small, large, ranges, strict=True):
        value = _finish(norm, total, _count(group, leaves))
        restore = jnp.where(s, 1 / r.up, jnp.where(g, r.factor / r.down, 1)).astype(value.dtype)
        factor = jnp.where(g, r.factor, 1).astype(value.dtype)
        norms.append(ScaledNorm(value * restore, factor))
    return norms


def _total(
    norm: str, group: Group, leaves: Sequence[jax.Array], scale: jax.Array | None = None
) -> jax.Array:
    """Sum of squares or of absolute values, or the maximum, of a group at a scale."""
    dtype = _accumulator(group, leaves)
    partials = []
    for member in group.members:
        parts = _parts(leaves[member.index], dtype)
        if scale is not None:
            parts = [part * jnp.expand_dims(scale, member.axes) for part in parts]
        if norm in ("l2", "rms"):
            sizes = sum((part * part for part in parts[1:]), parts[0] * parts[0])
        else:
            sizes = jnp.abs(lax.complex(*parts) if len(parts) == 2 else parts[0])
        reduce = jnp.max if norm == "linf" else jnp.sum
        partial = reduce(sizes, axis=member.axes)
        partials.append((partial, mesh.axes_of(partial, member.mesh_axes)))
    return mesh.reduce_over(partials, "max" if norm == "linf" else "sum")


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
    """The derivative of `by.value` along `slopes`: the sum over the group of dual * slope."""
    dtype = by.value.dtype
    partials, ties = [], []
    for member in group.members:
        x = leaves[member.index]
        if norm in ("l2", "rms"):
            dual = _parts(divide(x.astype(jnp.promote_types(x.dtype, dtype)), by, member.axes), dtype)
        else:
            sizes = jnp.abs(x)
            dual = _parts(jnp.sign(x), dtype)
            if norm == "linf":
                largest = jnp.expand_dims(by.value, member.axes).astype(sizes.dtype)
                hit = ((sizes == largest) & (largest > 0)).astype(dtype)
                dual = [part * hit for part in dual]
                count = jnp.sum(hit, axis=member.axes)
                ties.append((count, mesh.axes_of(count, member.mesh_axes)))
        products = [d * s for d, s in zip(dual, _parts(slopes[member.index], dtype), strict=True)]
        partial = jnp.sum(sum(products[1:], products[0]), axis=member.axes)
        partials.append((partial, mesh.axes_of(partial, member.mesh_axes)))
    slope = mesh.reduce_over(partials, "sum") * by.factor
    if norm == "rms":
        return slope / _count(group, leaves)
    if norm == "linf":
        return slope / jnp.maximum(mesh.reduce_over(ties, "sum"), 1)
    return slope


def _accumulator(group: Group, leaves: Sequence[jax.Array]) -> jnp.dtype:
    dtypes = (jnp.finfo(leaves[member.index].dtype).dtype for member in group.members)
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32)


def _parts(x: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    return [part.astype(dtype) for part in parts]


def _count(group: Group, leaves: Sequence[jax.Array]) -> int:
    """The number of elements that share each norm of the group, on all devices."""
    return sum(_members(leaves[member.index], member) for member in group.members)


def _members(x: jax.Array, member: Member) -> int:
    here = math.prod(x.shape[axis] for axis in member.axes)
    return here * mesh.total_size(mesh.axes_of(x, member.mesh_axes))
