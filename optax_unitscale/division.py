"""The division of a leaf by a norm, wherever in the range of the dtype the two are."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_unitscale.leaves import complex_of, opaque, real_parts

__all__ = ["HUGE_FACTOR", "Divisor", "ScaledNorm", "divide", "divisor"]

HUGE_FACTOR = 2.0**-40


class ScaledNorm(NamedTuple):
    """A norm as `value / factor`, so that one beyond the dtype's range is still held.

    `factor` is 1 unless the norm's square is huge.
    """

    value: jax.Array
    factor: jax.Array


class Divisor(NamedTuple):
    """A norm to divide by: `value / factor`, and `inverse`, 1 / value, finite; 1 and 0 for 0.

    Both come from one number, made by a division after all other arithmetic: a reciprocal whose
    sign is that of a huge norm's factor. XLA's loop over a leaf waits for that number only; one
    that waits for two takes a fifth longer on CPU.
    """

    value: jax.Array
    factor: jax.Array
    inverse: jax.Array


@jax.jit
def divisor(by: ScaledNorm) -> Divisor:
    """Prepares to divide by a norm; dividing by 0 gives 0."""
    zero, one = lax.full_like(by.value, 0), lax.full_like(by.value, 1)
    is_zero = lax.eq(by.value, zero)
    value = lax.select(is_zero, one, by.value)
    # Negative where the norm is huge: its magnitude is `inverse`, its sign tells the factor.
    sign = lax.select(lax.lt(by.factor, one), lax.neg(one), one)
    # Subnormal numbers, where the platform has them, have a reciprocal that is infinite.
    least = lax.full_like(value, jnp.finfo(value.dtype).tiny)
    signed = lax.div(lax.select(is_zero, zero, sign), lax.max(value, least))
    factor = lax.select(lax.lt(signed, zero), lax.full_like(one, HUGE_FACTOR), one)
    return Divisor(value, factor, lax.abs(signed))


@functools.partial(jax.jit, static_argnames=("axes", "root"))
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
    # The root comes before the division, after which what is small would be lost.
    factor = by.factor if root == 1 else lax.mul(by.factor, lax.full_like(by.factor, root))
    value, factor, inverse = (lax.expand_dims(y, axes) for y in (by.value, factor, by.inverse))
    parts = [_times(opaque(part), factor) for part in real_parts(x, value.dtype)]
    parts = [_over(part, value, inverse) for part in parts]
    return lax.convert_element_type(complex_of(parts), x.dtype)


def _times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies where the factor is not 1; where it is, XLA:CPU's loop has one product less."""
    return jnp.where(lax.eq(factor, lax.full_like(factor, 1)), x, lax.mul(x, factor))


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
