"""The four norms: from a sum to a norm, its derivative, and the division by it."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group
from optax_unitscale.sums import (
    RANGES,
    complex_of,
    count,
    real_parts,
    safe_sums,
    with_mesh_axes,
)

__all__ = ["Divisor", "ScaledNorm", "divide", "divisor", "group_norms", "root"]


class ScaledNorm(NamedTuple):
    """A norm as `value / factor`, so that one beyond the dtype's range is still held.

    `factor` is 1 unless the norm's square is huge.
    """

    value: jax.Array
    factor: jax.Array


class Divisor(NamedTuple):
    """A norm to divide by: `value`, 1 for 0, and `inverse`, which alone says all.

    It is 1 / value, 0 for 0, and negative where the norm's `factor` is not 1. Made by a division
    after all other arithmetic, it is the one number that XLA's loop over a leaf waits for; a loop
    that waits for two takes a fifth longer on CPU.
    """

    value: jax.Array
    inverse: jax.Array


_HUGE_FACTOR = 2.0**-40


def group_norms(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[ScaledNorm]:
    """The norm of every group, exact over the whole range of the dtype.

    Accumulated as `safe_sums` says. The derivative is that of the norm, and 0 where the norm is 0.

    Args:
      norm: "l2", "l1" or "linf"; or "rms", whose l2 norm is returned, for the rms itself can be
        below the dtype's range. The caller divides by `root`.
      groups: from `groups.assign`.
      leaves: the arrays that the groups' members index.

    Returns:
      One `ScaledNorm` a group.
    """
    norm = "l2" if norm == "rms" else norm

    @jax.custom_jvp
    def values(leaves: Sequence[jax.Array]) -> list[ScaledNorm]:
        return _norms(norm, groups, leaves)

    @values.defjvp
    def _(primals, tangents):
        (leaves,), (slopes,) = primals, tangents
        norms = values(leaves)
        along = _slopes(norm, groups, norms, leaves, slopes)
        return norms, [ScaledNorm(slope, jnp.zeros_like(slope)) for slope in along]

    return values(leaves)


def root(norm: str, group: Group, leaves: Sequence[jax.Array]) -> float:
    """The ratio of what `group_norms` measures to the norm: √n for the rms of n elements."""
    return math.sqrt(count(group, leaves)) if norm == "rms" else 1.0


def divisor(by: ScaledNorm) -> Divisor:
    """Prepares to divide by a norm; dividing by 0 gives 0."""
    is_zero = by.value == 0
    value = jnp.where(is_zero, 1, by.value)
    sign = jnp.where(is_zero, 0, jnp.where(by.factor < 1, -1, 1)).astype(value.dtype)
    return Divisor(value, sign / value)


def divide(x: jax.Array, by: Divisor, axes: tuple[int, ...], root: float = 1.0) -> jax.Array:
    """One leaf times `root` over its norm, in the norm's dtype, rounded once to the leaf's.

    Args:
      x: the leaf.
      by: its norm.
      axes: the axes of `x` over which the norm ran.
      root: a number of 1 or more.

    Returns:
      The quotient, of the leaf's shape and dtype.
    """
    value, inverse = (lax.expand_dims(part, axes) for part in by)
    is_huge = lax.lt(inverse, lax.full_like(inverse, 0))
    # The root comes before the division, after which what is small would be lost; and not as a
    # constant, which XLA would multiply with the inverse.
    factor = jnp.where(is_huge, _HUGE_FACTOR * root, root).astype(inverse.dtype)
    parts = [lax.mul(part, factor) for part in real_parts(x, value.dtype)]
    parts = [_over(part, value, lax.abs(inverse)) for part in parts]
    return lax.convert_element_type(complex_of(parts), x.dtype)


@jax.custom_jvp
def _over(x: jax.Array, value: jax.Array, inverse: jax.Array) -> jax.Array:
    """Divides by multiplying, but for single numbers: over their magnitude they are exactly 1."""
    product = lax.mul(x, inverse)
    return lax.select(inverse == 0, product, lax.div(x, value)) if x.size == value.size else product


@_over.defjvp
def _(primals, tangents):
    # The inverse's own derivative holds its square, which leaves the dtype's range.
    (x, value, inverse), (dx, dvalue, _) = primals, tangents
    result = _over(x, value, inverse)
    return result, _over(dx, value, inverse) - result * _over(dvalue, value, inverse)


def _norms(norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[ScaledNorm]:
    norms = []
    for total, scale in safe_sums(norm, groups, leaves):
        safe = RANGES[total.dtype]
        one = lax.full_like(scale, 1)
        is_huge = lax.lt(scale, one)
        factor = lax.select(is_huge, lax.full_like(scale, _HUGE_FACTOR), one)
        # factor / scale, but a division here would cut XLA's fusion of all this in two.
        undo_down = lax.full_like(scale, _HUGE_FACTOR / safe.down)
        undo_up = lax.full_like(scale, 1 / safe.up)
        undo = lax.select(is_huge, undo_down, lax.select(lax.eq(scale, one), one, undo_up))
        measured = lax.sqrt(total) if norm == "l2" else total
        norms.append(ScaledNorm(lax.mul(measured, undo), factor))
    return norms


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
            x = complex_of(real_parts(leaves[member.leaf], dtype))
            factor = lax.expand_dims(by.factor, member.axes)
            dual = divide(x, divisor(by), member.axes) if norm == "l2" else _signs(x)
            dual = real_parts(dual, dtype)
            if norm == "linf":
                scaled = complex_of([lax.mul(part, factor) for part in real_parts(x, dtype)])
                hit = lax.eq(lax.abs(scaled), lax.expand_dims(by.value, member.axes)).astype(dtype)
                dual = [part * hit for part in dual]
                hits.append(jnp.sum(hit, axis=member.axes))
            along = [lax.mul(part, factor) for part in real_parts(slopes[member.leaf], dtype)]
            products = [d * s for d, s in zip(dual, along, strict=True)]
            sums.append(jnp.sum(sum(products[1:], products[0]), axis=member.axes))
        partials.append(with_mesh_axes(group, sums))
        ties.append(with_mesh_axes(group, hits) if hits else [])
    totals = mesh.combine(partials, "sum")
    if norm != "linf":
        return totals
    return [t / n for t, n in zip(totals, mesh.combine(ties, "sum"), strict=True)]


def _signs(x: jax.Array) -> jax.Array:
    """Each element over its magnitude, 0 for 0."""
    parts = real_parts(x, jnp.finfo(x.dtype).dtype)
    # A complex number's magnitude can leave the range that its parts are in.
    is_huge = functools.reduce(lax.bitwise_or, [lax.abs(part) > 2.0**60 for part in parts])
    factor = jnp.where(is_huge, _HUGE_FACTOR, 1).astype(parts[0].dtype)
    magnitude = lax.abs(complex_of([lax.mul(part, factor) for part in parts]))
    return divide(x, divisor(ScaledNorm(magnitude, factor)), ())
