"""Sums of many axes are added up well, and XLA does not take apart what a leaf is a product of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from common import NORMS, exported_for, scaled


def check_equal_elements(shape: tuple[int, ...], axis: Any, dtype: str, norm: str) -> None:
    gradient = np.full(shape, 0.1, dtype)
    result = scaled(jnp.asarray(gradient), norm, axis=axis)
    sizes = np.abs(np.asarray(result).astype(np.clongdouble))
    norms = (sizes**2).sum(axis) ** 0.5 if norm == "l2" else sizes.sum(axis)
    assert np.abs(norms - 1).max() < 12 * oracle.epsilon(np.dtype(dtype))


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("dtype", ["float32", "complex64", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((13, 14, 15), None),
        ((3, 3, 16, 16), None),
        ((2, 45, 45), (1, 2)),
        ((300, 13, 14, 15), (1, 2, 3)),
        # A norm for each attention head, and other kept axes between those that are summed.
        ((8192, 2, 16), (0, 2)),
        ((32, 2, 32, 1, 32, 2, 8), (0, 2, 4, 6)),
        ((16, 1, 16, 1, 16, 1, 16, 1, 16), (0, 2, 4, 6, 8)),
        ((2**22, 2, 1), (0, 2)),
        ((2,) * 20, None),
        ((8, 8, 8, 8, 8, 8, 1, 1, 1), None),
    ],
)
@pytest.mark.usefixtures("x64")
def test_equal_elements_in_many_axes_are_not_added_one_by_one(shape, axis, dtype, norm):
    # XLA:CPU does so below 4096 elements, in nine axes and more, and where kept axes lie between;
    # before JAX 0.10.2 everywhere: off by up to 86 units, 300, and with more axes by 55693.
    check_equal_elements(shape, axis, dtype, norm)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2,) * 20, None),
        ((31, 31, 31), (0, 1)),
        ((7, 32, 32, 31), (1, 2, 3)),
        ((512, 2, 16), (0, 2)),
        ((4, 2) * 6, tuple(range(0, 12, 2))),
    ],
)
@pytest.mark.usefixtures("x64", "one_device")
def test_on_one_device_that_holds_too(shape, axis, dtype):
    check_equal_elements(shape, axis, dtype, "l1")


@pytest.mark.parametrize(
    ("platform", "dtype", "by"),
    [
        *((platform, "float32", 1e25) for platform in ("cpu", "cuda", "tpu")),
        # XLA:TPU makes float64 of two float32, which do not reach as far.
        *((platform, "float64", 1e200) for platform in ("cpu", "cuda")),
    ],
)
@pytest.mark.usefixtures("x64")
def test_what_a_leaf_is_a_product_of_is_not_squared_by_itself(platform, dtype, by):
    # XLA would take the sum of squares of c * y as that of c * c * y * y.
    constants = [np.full(shape, 1 / by, dtype) for shape in ((), (5,), (64, 80))]
    constants[2][0, 0] = 0.5 / by

    def update(x):
        leaves = [jnp.asarray(constant) * x for constant in constants]
        return [scaled(leaves, norm) for norm in NORMS] + [scaled(leaves[2], "linf", axis=0)]

    x = np.asarray(by, dtype)
    run = jax.jit(update) if platform == "cpu" else exported_for(update, x, platform)
    *results, columns = run(x)
    gradients = [constant * x for constant in constants]
    for norm, leaves in zip(NORMS, results, strict=True):
        for gradient, result in zip(gradients, leaves, strict=True):
            expected = gradient / oracle.norm_of([gradient], norm)
            np.testing.assert_allclose(result, expected, rtol=4 * oracle.epsilon(dtype))
    expected = gradients[2] / gradients[2].max(axis=0)
    np.testing.assert_allclose(columns, expected, rtol=4 * oracle.epsilon(dtype))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("beside", "leaf", "by"), [(1e-34, 0, 1e27), (1e-34, 0, 1e38), (1e37, 1e36, 1e-27)]
)
def test_a_number_times_a_leaf_is_not_taken_apart_beside_what_is_tiny_or_huge(
    beside, leaf, by, norm
):
    # XLA would multiply the number with the power of two that the other leaf's norm needs.
    n = 5000
    tree = [jnp.full(n, beside, jnp.float32), jnp.full(n, leaf, jnp.float32)]

    def update(tree):
        return scaled([tree[0], tree[1] * jnp.float32(by)], norm, scope="global")

    product = np.full(n, leaf, np.float64) * float(np.float32(by))
    size = oracle.norm_of([np.full(n, beside, np.float32), product], norm)
    for run in (jax.jit(update), exported_for(update, tree)):
        result = np.asarray(run(tree)[1], np.float64)
        np.testing.assert_allclose(result, product / float(size), rtol=1e-6, atol=1.2e-38)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.usefixtures("x64")
def test_narrow_leaves_beside_a_float64_one_are_added_up_as_well(dtype):
    tree = [np.full((15, 15, 15), 0.1, dtype), np.full(3, 0.001)]
    result = np.asarray(scaled(jax.tree.map(jnp.asarray, tree), scope="global")[1])
    assert np.abs(result / (tree[1] / oracle.norm_of(tree, "l2")) - 1).max() < 12 * 2.0**-52
