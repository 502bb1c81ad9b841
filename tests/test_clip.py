"""`clip_norm` shortens what is too long by one factor, and leaves the rest bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from common import EMPTY, NORMS, sample

from optax_unitscale import clip_norm


def clipped(tree: Any, max_norm: Any, *args: Any, **options: Any) -> Any:
    return clip_norm(max_norm, *args, **options).update(tree, EMPTY)[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_too_long_gets_the_norm_and_what_is_not_stays_bit_for_bit(norm, dtype):
    magnitudes = [1e-3, 1.0, 1e3] if dtype == "float16" else [1e-30, 1e-3, 1.0, 1e3, 1e25]
    for magnitude in magnitudes:
        gradient = sample((90,), dtype, magnitude)
        exact = float(oracle.norm_of([gradient], norm))
        for share in (0.5, 0.99, 1.01, 1e4):
            limit = np.float32(exact * share)
            result = np.asarray(clipped(jnp.asarray(gradient), limit, norm))
            assert result.dtype == gradient.dtype
            if share > 1:
                np.testing.assert_array_equal(result, gradient)
                continue
            eps, tiny = oracle.epsilon(dtype), float(jnp.finfo(dtype).tiny)
            expected = gradient.astype(np.float64) / exact * float(limit)
            error = np.abs(result.astype(np.float64) - expected)
            assert (error <= 4 * 2.0**-23 * np.abs(expected) + eps * np.abs(expected) + tiny).all()


def test_a_float16_gradient_below_the_limit_is_not_rounded_where_two_factors_would():
    gradient = jnp.asarray(np.linspace(1e-6, 3e-5, 200).astype(np.float16))
    np.testing.assert_array_equal(clipped(gradient, 1000.0), gradient)
    unit = gradient / jnp.float16(1000)
    assert (np.asarray(unit * jnp.float16(1000)) != np.asarray(gradient)).any()


def test_it_is_clip_by_global_norm_where_that_is_right_and_right_where_that_fails():
    tree = {"a": sample((40,), "float32"), "b": sample((3, 5), "float32", 10.0)}
    expected, _ = optax.clip_by_global_norm(2.0).update(tree, EMPTY)
    for result, other in zip(
        *map(jax.tree.leaves, (clipped(tree, 2.0, scope="global"), expected)), strict=True
    ):
        np.testing.assert_allclose(result, other, rtol=4 * 2.0**-23)
    huge = sample((40,), "float32", 1e25)
    wrong, _ = optax.clip_by_global_norm(2.0).update({"x": jnp.asarray(huge)}, EMPTY)
    assert not optax.tree.norm(wrong) > 1.9
    assert abs(np.linalg.norm(np.asarray(clipped(jnp.asarray(huge), 2.0))) - 2) < 1e-6


def test_each_slice_layer_or_label_is_clipped_by_itself():
    tree = {"x": {"kernel": jnp.array([[3.0, 4.0], [0.3, 0.4]]), "bias": jnp.zeros(2)}}
    rows = clipped(tree, 1.0, axis=-1)["x"]["kernel"]
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
    layer = clipped(tree, 1.0, scope="layer")["x"]["kernel"]
    assert abs(np.linalg.norm(layer) - 1) < 1e-6


def test_zero_stays_zero_and_nan_or_an_infinity_is_nan_in_its_group_only():
    tree = [jnp.zeros(3), jnp.array([jnp.nan, 1.0]), jnp.array([jnp.inf, 1.0]), jnp.ones(1)]
    zero, nan, infinite, one = clipped(tree, 2.0)
    np.testing.assert_array_equal(zero, 0.0)
    assert np.isnan(nan).all()
    assert np.isnan(infinite).all()
    np.testing.assert_array_equal(one, 1.0)
    np.testing.assert_array_equal(clipped(jnp.ones(3), 0.0), 0.0)


def test_the_limit_may_be_traced_injected_or_scheduled():
    x = jnp.array([3.0, 4.0])
    expected = np.array([1.5, 2.0])
    np.testing.assert_allclose(jax.jit(lambda m: clipped(x, m))(2.5), expected, rtol=1e-6)
    tx: Any = optax.inject_hyperparams(clip_norm)(max_norm=lambda n: jnp.where(n == 0, 2.5, 10.0))
    first, state = tx.update(x, tx.init(x))
    second, _ = tx.update(x, state)
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    np.testing.assert_array_equal(second, x)
    with pytest.raises(ValueError, match=r"clip_norm: max_norm is -1\.0, expected 0 to"):
        clip_norm(-1.0)


def test_its_derivative_is_that_of_the_identity_within_and_of_the_quotient_beyond():
    jacobian = jax.jacrev(lambda x: clipped(x, 1.0))
    for within in (jnp.zeros(2), jnp.array([0.3, 0.4])):
        np.testing.assert_array_equal(jacobian(within), np.eye(2))
    u = np.array([0.6, 0.8])
    expected = (np.eye(2) - np.outer(u, u)) / 5
    np.testing.assert_allclose(jacobian(jnp.array([3.0, 4.0])), expected, rtol=1e-5, atol=1e-7)


def test_no_element_is_lost_that_the_result_holds():
    for gradient, limit in (
        ([1e38, 1.0], 1e37),
        ([1e38, 1e-30], 1e37),
        ([1e30, 1e-10], 1e25),
        ([1e-30, 1e-37], 1e-31),
        ([3e38, 1.0], 1e-37),
    ):
        exact = np.array(gradient) * (limit / np.linalg.norm(gradient))
        result = np.asarray(clipped(jnp.array(gradient, jnp.float32), limit), np.float64)
        np.testing.assert_allclose(result, exact, rtol=8 * 2.0**-23, atol=1.2e-38)
