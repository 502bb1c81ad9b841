"""The norm of the result is 1 and its elements are the quotient, at any magnitude."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import oracle
import pytest

from optax_unitscale import gradient_norms, unit_scale

NORMS = ["l2", "rms", "l1", "linf"]
EMPTY = optax.EmptyState()
# Two or three decades inside the normal range, so that normal samples stay in it.
MAGNITUDES = {
    "float16": [1e-2, 1.0, 300.0, 1e4],
    "bfloat16": [1e-35, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e20, 1e30, 1e36],
    "float32": [1e-35, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e20, 1e30, 1e36],
    "complex64": [1e-35, 1e-20, 1.0, 1e20, 1e36],
    "float64": [1e-300, 1e-200, 1e-160, 1.0, 1e153, 1e200, 1e300],
    "complex128": [1e-300, 1e-160, 1.0, 1e200, 1e300],
}
WIDE = ("float64", "complex128")


def scaled(tree: Any, norm: str, **options: Any) -> Any:
    return unit_scale(norm, **options).update(tree, EMPTY)[0]


def sample(shape, dtype, magnitude=1.0, seed=0):
    """Normal samples, none so near to zero that it would be subnormal."""
    rng = np.random.default_rng(seed)
    draws = rng.normal(size=(2, *shape))
    draws = np.where(np.abs(draws) < 0.01, 0.01, draws) * magnitude
    dtype = jnp.dtype(dtype)
    values = draws[0] + 1j * draws[1] if jnp.issubdtype(dtype, jnp.complexfloating) else draws[0]
    return values.astype(dtype)


def check_group(results, gradients, norm):
    """Unit norm and true quotients, within a few units of the leaves' precision."""
    eps = max(oracle.epsilon(g.dtype) for g in gradients)
    results = [np.asarray(r) for r in results]
    # Half a unit for each rounding of an element, which for the worst of signs all add up; two
    # more for the sum, its root and its reciprocal.
    assert abs(oracle.norm_of(results, norm) - 1) < 3 * eps
    for result, gradient, quotient in zip(
        results, gradients, oracle.unit(gradients, norm), strict=True
    ):
        assert result.dtype == gradient.dtype
        assert result.shape == gradient.shape
        own = oracle.epsilon(gradient.dtype)
        tiny = float(jnp.finfo(gradient.dtype).tiny)
        wide = result.astype(np.complex128 if np.iscomplexobj(result) else np.float64)
        assert (np.abs(wide - quotient) <= 4 * own * np.abs(quotient) + tiny).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_each_leaf_has_unit_norm_at_every_magnitude(norm, dtype, request):
    if dtype in WIDE:
        request.getfixturevalue("x64")
    for shape, magnitude in itertools.product([(), (1,), (300,), (64, 130)], MAGNITUDES[dtype]):
        gradient = sample(shape, dtype, magnitude)
        check_group([scaled(jnp.asarray(gradient), norm)], [gradient], norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_the_whole_tree_has_unit_norm_at_every_magnitude(norm, dtype, request):
    if dtype in WIDE:
        request.getfixturevalue("x64")
    for magnitude in MAGNITUDES[dtype]:
        tree = [sample((40, 7), dtype, magnitude), sample((33,), dtype, magnitude, seed=1)]
        check_group(scaled([jnp.asarray(g) for g in tree], norm, scope="global"), tree, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_every_slice_has_unit_norm_though_neighbours_differ_by_sixty_decades(norm):
    rows = 10.0 ** np.array([-33, -20, -7, 0, 9, 20, 33])
    gradient = (sample((7, 50), "float32") * rows[:, None]).astype(np.float32)
    result = scaled(jnp.asarray(gradient), norm, axis=1)
    for row, slice_ in zip(np.asarray(result), gradient, strict=True):
        check_group([row], [slice_], norm)


@pytest.mark.parametrize("norm", NORMS)
def test_a_tensor_may_hold_tiny_and_huge_elements_together(norm):
    gradient = np.array([1e-30, -1e25, 3e24, 1e-10, 2e18, -1e-37, 5e11], np.float32)
    check_group([scaled(jnp.asarray(gradient), norm)], [gradient], norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", ["leaf", "global", {"a": "x", "b": "x", "c": "y"}])
def test_leaves_of_far_magnitudes_stand_beside_each_other(norm, scope):
    tree = {
        "a": sample((9, 5), "float32", 1e-28),
        "b": sample((45,), "float32", 1e28),
        "c": sample((3,), "float32", 1e-3),
    }
    result = scaled(jax.tree.map(jnp.asarray, tree), norm, scope=scope)
    groups = {"leaf": ["a", "b", "c"], "global": ["abc"]}.get(str(scope), ["ab", "c"])
    for group in groups:
        check_group([result[k] for k in group], [tree[k] for k in group], norm)


def test_two_thousand_bfloat16_leaves_of_one_element_have_unit_norm_together():
    tree = [jnp.full((1,), 0.01 * (1 + i % 7), jnp.bfloat16) for i in range(2000)]
    result = scaled(tree, "l2", scope="global")
    check_group(result, [np.asarray(x) for x in tree], "l2")


@pytest.mark.parametrize("shape", [(10**7,), (3000, 5000), (100, 100000)])
def test_millions_of_elements_have_unit_norm(shape):
    gradient = np.random.default_rng(0).random(shape, np.float32)
    result = np.asarray(scaled(jnp.asarray(gradient), "l2"), np.float64)
    assert abs(np.sqrt(np.sum(result**2)) - 1) < 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [-110, -70, -30, 30, 70, 110])
def test_a_power_of_two_does_not_change_the_result(norm, power):
    gradient = sample((50, 20), "float32")
    before = np.asarray(scaled(jnp.asarray(gradient), norm))
    after = np.asarray(scaled(jnp.asarray(gradient * np.float32(2.0**power)), norm))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("norm", NORMS)
def test_scaling_twice_is_scaling_once(norm):
    once = scaled(jnp.asarray(sample((50, 20), "float32", 1e-25)), norm)
    twice = scaled(once, norm)
    np.testing.assert_allclose(np.asarray(twice), np.asarray(once), rtol=3 * 2.0**-23)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_updates_stay_zero(norm):
    tree = {"zero": jnp.zeros((3, 2)), "other": jnp.ones(2)}
    for scope in ("leaf", "global"):
        assert (np.asarray(scaled(tree, norm, scope=scope)["zero"]) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_with_nan_or_inf_is_nan_throughout_and_alone(norm, bad):
    tree = {"bad": jnp.array([1.0, bad, 0.0]), "good": jnp.array([3.0, 4.0])}
    result = scaled(tree, norm)
    assert np.isnan(np.asarray(result["bad"])).all()
    check_group([result["good"]], [np.asarray(tree["good"])], norm)
    together = scaled(tree, norm, scope="global")
    assert all(np.isnan(np.asarray(x)).all() for x in jax.tree.leaves(together))
    rows = scaled(jnp.array([[1.0, bad], [3.0, 4.0]]), norm, axis=1)
    assert np.isnan(np.asarray(rows)[0]).all()
    assert np.isfinite(np.asarray(rows)[1]).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20])
def test_the_naive_quotient_fails_where_ours_holds(magnitude):
    gradient = sample((300,), "float32", magnitude)
    naive = np.asarray(jnp.asarray(gradient) / jnp.linalg.norm(jnp.asarray(gradient)))
    peer, _ = optax.normalize_by_update_norm().update(jnp.asarray(gradient), EMPTY)
    for wrong in (naive, np.asarray(peer)):
        assert not abs(np.linalg.norm(wrong) - 1) < 0.1
    check_group([scaled(jnp.asarray(gradient), "l2")], [gradient], "l2")


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
    for scope in ("leaf", "global"):

        def function(tree, scope=scope):
            return [jnp.sin(u) for u in jax.tree.leaves(scaled(tree, norm, scope=scope))]

        jax.test_util.check_grads(function, (tree,), order=2, atol=1e-5, rtol=1e-5)


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


def test_gradient_norms_are_exact_where_float32_squares_are_not():
    for magnitude in (1e-30, 1e-20, 1e20, 1e30):
        gradient = sample((300,), "float32", magnitude)
        for norm in NORMS:
            measured = float(gradient_norms(jnp.asarray(gradient), norm)["updates"])
            expected = float(oracle.norm_of([gradient], norm))
            assert abs(measured / expected - 1) < 4 * 2.0**-23
