"""The update's derivatives: (I - uuᵀ)/‖x‖ and its like, at any magnitude, forward and reverse."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from common import NORMS, sample, scaled


def derivative(x, v, norm):
    """The directional derivative of x/‖x‖ by the quotient rule, in float64."""
    n = float(oracle.norm_of([x], norm))
    slope = {
        "l2": lambda: (x @ v) / n,
        "rms": lambda: (x @ v) / n / x.size,
        "l1": lambda: np.sign(x) @ v,
        "linf": lambda: np.sign(x[np.abs(x).argmax()]) * v[np.abs(x).argmax()],
    }[norm]()
    return v / n - x * slope / n**2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_the_derivative_is_that_of_the_quotient_forward_and_reverse(norm, magnitude):
    x = sample((12,), "float32", magnitude)
    v, w = sample((2, 12), "float32", seed=1)

    def function(t):
        return scaled(t, norm)

    forward = jax.jvp(function, (jnp.asarray(x),), (jnp.asarray(v),))[1]
    exact = derivative(x.astype(np.float64), v.astype(np.float64), norm)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * np.abs(exact).max()}
    np.testing.assert_allclose(np.asarray(forward), exact, **tolerance)
    (reverse,) = jax.vjp(function, jnp.asarray(x))[1](jnp.asarray(w))
    np.testing.assert_allclose(
        float(np.asarray(reverse, np.float64) @ v), float(exact @ w), rtol=1e-4
    )


@pytest.mark.parametrize("norm", NORMS)
def test_first_and_second_derivatives_agree_with_finite_differences(norm, x64):
    x = jnp.asarray(sample((6,), "float64"))
    tree = {"a": x[:4], "b": x[4:]}
    for scope, order in (("leaf", 2), ("global", 1)):

        def function(tree, scope=scope):
            return [jnp.sin(u) for u in jax.tree.leaves(scaled(tree, norm, scope=scope))]

        jax.test_util.check_grads(jax.jit(function), (tree,), order=order, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [-110, -62, 62, 110])
@pytest.mark.parametrize("size", [1, 5])
def test_second_derivatives_along_a_gradient_do_not_depend_on_its_magnitude(norm, power, size):
    x, v = sample((2, size), "float32", seed=3)

    def twice(scale):
        def once(t):
            return jax.jvp(lambda t: scaled(t, norm), (t,), (jnp.asarray(v * scale),))[1]

        return jax.jvp(once, (jnp.asarray(x * scale),), (jnp.asarray(v * scale),))[1]

    there, here = np.asarray(twice(np.float32(2.0**power))), np.asarray(twice(np.float32(1)))
    np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-5 * np.abs(v / x).max() ** 2)


@pytest.mark.parametrize("norm", NORMS)
def test_the_derivative_at_zero_is_zero(norm):
    def function(t):
        return scaled(t, norm).sum()

    np.testing.assert_array_equal(np.asarray(jax.grad(function)(jnp.zeros(3))), 0)
    np.testing.assert_array_equal(np.asarray(jax.hessian(function)(jnp.zeros(3))), 0)


@pytest.mark.parametrize("norm", NORMS)
def test_complex_derivatives_agree_with_finite_differences(norm, x64):
    z = jnp.asarray(sample((5,), "complex128"))

    def function(real, imaginary):
        u = scaled(jax.lax.complex(real, imaginary), norm)
        return jnp.sin(u.real) + u.imag

    jax.test_util.check_grads(function, (z.real, z.imag), order=2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 2.9e38])
def test_complex_derivatives_do_not_depend_on_the_magnitude(norm, magnitude):
    """At the largest, a number's magnitude is beyond float32, though its parts are not."""
    z = np.array([1 + 1j, 0.5 - 0.25j, 0.3j], np.complex64)
    v = np.array([0.25 - 0.5j, 0.5, 0.125 + 0.25j], np.complex64)

    def along(scale):
        inputs = (jnp.asarray(z * scale),), (jnp.asarray(v * scale),)
        return np.asarray(jax.jvp(lambda t: scaled(t, norm), *inputs)[1])

    np.testing.assert_allclose(along(np.float32(magnitude)), along(np.float32(1)), atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_tangents_as_large_as_the_largest_gradient_do_not_overflow(norm):
    x = jnp.asarray(sample((64,), "float32", 5e37))

    def along(x):
        return np.asarray(jax.jvp(lambda t: scaled(t, norm), (x,), (x,))[1])

    # Along itself a gradient's direction does not change.
    np.testing.assert_allclose(along(x), 0, atol=64 * 2.0**-23)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_derivatives_keep_the_dtype_under_strict_promotion(norm, dtype):
    x, v = (jnp.asarray(sample((12,), dtype, seed=seed)) for seed in (0, 1))
    tangent = jax.jvp(lambda t: scaled(t, norm), (x,), (v,))[1]
    (cotangent,) = jax.vjp(lambda t: scaled(t, norm), x)[1](v)
    wide = jnp.complex64 if dtype == "complex64" else jnp.float32
    exact = jax.jvp(lambda t: scaled(t, norm), (x.astype(wide),), (v.astype(wide),))[1]
    assert tangent.dtype == cotangent.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(
        np.asarray(tangent.astype(wide)), np.asarray(exact), atol=16 * oracle.epsilon(dtype)
    )


@pytest.mark.parametrize("count", [1, 4, 3000])
def test_the_derivative_of_the_largest_complex_number_is_finite(count):
    gradient = jax.jit(jax.grad(lambda z: scaled(z, "linf").real.sum()))
    for seed in range(40):
        z = jnp.asarray(sample((count,), "complex64", seed=seed))
        assert np.isfinite(np.asarray(gradient(z))).all()


def test_what_is_nearly_the_largest_has_no_part_in_the_derivative_of_the_largest():
    x = jnp.array([1.0, 1 - 2.0**-22, 0.5, -1 + 3 * 2.0**-23])
    gradient = jax.grad(lambda x: scaled(x, "linf")[2])(x)
    np.testing.assert_array_equal(np.asarray(gradient), [-0.5, 0, 1, 0])
