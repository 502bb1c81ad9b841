"""The update's derivatives: (I - uuᵀ)/‖x‖ and its like, at any magnitude, forward and reverse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from common import NORMS, every_norm, sample, scaled

from optax_unitscale import gradient_norms


def slope(x: Any, v: Any, norm: str, step: float = 1e-6) -> np.ndarray:
    """The derivative along v of each row over its norm, by differences of NumPy's widest type."""
    x, v = oracle.widen(x), np.longdouble(step) * oracle.widen(v)
    one, other = ([oracle.unit([row], norm)[0] for row in y] for y in (x + v, x - v))
    return (np.stack(one) - np.stack(other)) / (2 * np.longdouble(step))


def curvature(x: Any, v: Any, norm: str, step: float = 1e-4) -> np.ndarray:
    """The second derivative along v."""
    x, v, h = oracle.widen(x), oracle.widen(v), np.longdouble(step)
    one, other = (slope(y, v, norm, step) for y in (x + h * v, x - h * v))
    return (one - other) / (2 * h)


@pytest.mark.parametrize("norm", NORMS)
def test_first_and_second_derivatives_are_those_of_the_quotient_at_any_magnitude(norm):
    def update(x):
        # Two leaves that share a norm for each row.
        halves = scaled([x[:, :2], x[:, 2:]], norm, scope="global", axis=1)
        return jnp.concatenate(halves, 1)

    @jax.jit
    def derivatives(x, v, w):
        """That along v, and the gradients of its and the update's inner product with w."""
        forward, reverse_twice = jax.vjp(lambda x: jax.jvp(update, (x,), (v,))[1], x)
        return forward, jax.vjp(update, x)[1](w)[0], reverse_twice(w)[0]

    x, v, w = (sample((3, 5), seed=seed) for seed in (0, 1, 2))
    first, second = slope(x, v, norm), curvature(x, v, norm)
    for power in (-100, -55, 0, 55, 100):
        by = np.float32(2.0**power)
        # Along a direction as large as the gradient the result does not depend on it.
        forward, *reverse = map(np.asarray, derivatives(x * by, v * by, w))
        np.testing.assert_allclose(forward, first.astype(float), rtol=1e-4, atol=1e-5)
        for result, expected in zip(reverse, (first, second), strict=True):
            inner = np.sum(result * v * np.float64(by)), float(np.sum(expected * w))
            np.testing.assert_allclose(*inner, rtol=1e-3, atol=1e-4)


def test_the_derivative_at_zero_is_zero():
    def total(x):
        return sum(u.sum() for u in every_norm(x).values())

    along = jax.jit(lambda x, v: jax.jvp(jax.grad(total), (x,), (v,)))
    for slope in along(jnp.zeros(3), jnp.asarray(sample((3,)))):
        np.testing.assert_array_equal(slope, 0)


def test_complex_derivatives_are_those_of_the_quotient_at_any_magnitude():
    z = np.array([[1 + 1j, 0.5 - 0.25j, 0.3j]], np.complex64)
    v = np.array([[0.25 - 0.5j, 0.5, 0.125 + 0.25j]], np.complex64)
    w = v[:, ::-1] * np.complex64(1j)

    @jax.jit
    def derivatives(z, v):
        def once(z):
            return jax.jvp(every_norm, (z,), (v,))[1]

        forward, twice = jax.jvp(once, (z,), (v,))
        # JAX's inner product of complex numbers does not conjugate.
        reverse = {norm: jax.vjp(lambda z, n=norm: scaled(z, n), z)[1](w)[0] for norm in NORMS}
        return forward, twice, reverse

    # At the largest a number's magnitude is beyond float32, though its parts are not.
    for scale in map(np.float32, (1e-30, 1.0, 2.9e38)):
        forward, twice, reverse = derivatives(z * scale, v * scale)
        for norm in NORMS:
            first, second = (f(z, v, norm).astype(complex) for f in (slope, curvature))
            np.testing.assert_allclose(forward[norm], first, atol=1e-5)
            np.testing.assert_allclose(twice[norm], second, atol=1e-4)
            if scale < 1e38:  # There it is below the normal range.
                inner = np.sum(np.asarray(reverse[norm], complex) * v * scale).real
                np.testing.assert_allclose(inner, np.sum(first * w).real, rtol=1e-4)


def test_tangents_as_large_as_the_largest_gradient_do_not_overflow():
    x = jnp.asarray(sample((64,), "float32", 5e37))
    tangents = jax.jit(lambda x: jax.jvp(every_norm, (x,), (x,))[1])(x)
    for tangent in tangents.values():
        # Along itself a gradient's direction does not change.
        np.testing.assert_allclose(tangent, 0, atol=64 * 2.0**-23)


def test_derivatives_keep_the_dtype_under_strict_promotion():
    dtypes = ["float16", "bfloat16", "complex64"]
    x, v = ([jnp.asarray(sample((12,), dtype, seed=seed)) for dtype in dtypes] for seed in (0, 1))

    @jax.jit
    def along(x, v):
        def update(x):
            return {norm: scaled(x, norm) for norm in ("l2", "linf")}

        return jax.jvp(update, (x,), (v,))[1], jax.vjp(update, x)[1]({"l2": v, "linf": v})[0]

    tangents, cotangents = along(x, v)
    assert [y.dtype for y in cotangents] == dtypes
    for norm, results in tangents.items():
        for result, y, u in zip(results, x, v, strict=True):
            assert result.dtype == y.dtype
            exact = slope(y[None], u[None], norm)[0]
            close = 16 * oracle.epsilon(result.dtype)
            np.testing.assert_allclose(
                np.asarray(result).astype(complex), exact.astype(complex), rtol=close, atol=close
            )


def test_the_derivative_of_the_largest_complex_number_is_finite():
    def total(z):
        return sum(u.real.sum() for u in scaled([z, z[:4], z[:1]], "linf"))

    gradient = jax.jit(jax.grad(total))
    for seed in range(40):
        z = jnp.asarray(sample((3000,), "complex64", seed=seed))
        assert np.isfinite(np.asarray(gradient(z))).all()


@pytest.mark.parametrize("size", [2e-38, 1.0, 3e38])
def test_the_slope_of_a_complex_sum_of_magnitudes_is_the_same_at_any_magnitude(size):
    z = jnp.full(3, size, jnp.complex64)
    # Along one element of z the norm grows as that element does.
    _, rise = jax.jvp(lambda z: gradient_norms([z], "l1")["0"], (z,), (jnp.ones_like(z),))
    assert float(rise) == pytest.approx(3, rel=1e-6)


def test_elements_that_tie_for_the_largest_share_its_slope():
    x, v = jnp.array([1.0, -1.0, 0.5]), jnp.array([1.0, 0.0, 4.0])
    _, rise = jax.jvp(lambda x: gradient_norms([x], "linf")["0"], (x,), (v,))
    assert float(rise) == 0.5


def test_what_is_nearly_the_largest_has_no_part_in_the_derivative_of_the_largest():
    x = jnp.array([1.0, 1 - 2.0**-22, 0.5, -1 + 3 * 2.0**-23])
    gradient = jax.grad(lambda x: scaled(x, "linf")[2])(x)
    np.testing.assert_array_equal(np.asarray(gradient), [-0.5, 0, 1, 0])
