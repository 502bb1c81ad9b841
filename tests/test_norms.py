"""The norm of the result is 1 and its elements are the quotient, at any magnitude."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from common import EMPTY, LARGE, NORMS, check_group, every_norm, program, sample, scaled

from optax_unitscale import gradient_norms

WIDE = [1e-35, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e20, 1e30, 1e36]
# Two or three decades inside the normal range, so that normal samples stay in it.
MAGNITUDES = {
    "float16": [1e-2, 1.0, 300.0, 1e4],
    "bfloat16": WIDE,
    "float32": WIDE,
    "complex64": WIDE,
    "float64": [1e-300, 1e-200, 1e-160, 1.0, 1e153, 1e200, 1e300],
    "complex128": [1e-300, 1e-160, 1.0, 1e200, 1e300],
}
cpu_and_gpu = pytest.mark.parametrize("platform", ["cpu", "cuda"])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20])
def test_the_naive_quotient_fails_where_ours_holds(magnitude):
    gradient = sample((300,), "float32", magnitude)
    naive = np.asarray(jnp.asarray(gradient) / jnp.linalg.norm(jnp.asarray(gradient)))
    peer, _ = optax.normalize_by_update_norm().update(jnp.asarray(gradient), EMPTY)
    for wrong in (naive, np.asarray(peer)):
        assert not abs(np.linalg.norm(wrong) - 1) < 0.1
    check_group([scaled(jnp.asarray(gradient))], [gradient], "l2")


@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_a_leaf_of_any_size_and_dtype_has_unit_norm_at_every_magnitude(dtype, request):
    if dtype in ("float64", "complex128"):
        request.getfixturevalue("x64")
    for magnitude in MAGNITUDES[dtype]:
        tree = [sample(shape, dtype, magnitude) for shape in [(), LARGE]]
        for result, gradient in zip(scaled(tree), tree, strict=True):
            check_group([result], [gradient], "l2")


@cpu_and_gpu
def test_leaves_of_16_bits_may_share_columns_with_float64(platform, x64):
    tree = [sample((8, 6, 3), dtype) for dtype in ("float16", "bfloat16", "float64")]
    unit = program(lambda tree: scaled(tree, scope="global", axis=(0, 1)), tree, platform)
    results = unit(tree)
    for column in range(3):
        check_group([x[..., column] for x in results], [x[..., column] for x in tree], "l2")


@functools.cache
def small_and_large(platform: str) -> Any:
    """All norms of a small leaf, a large one, its rows, and both leaves together."""

    def measure(tree):
        rows = {"rows": tree["large"]}
        return {
            norm: (
                scaled(tree, norm) | scaled(rows, norm, axis=1),
                scaled(tree, norm, scope="global"),
                gradient_norms(tree, norm) | gradient_norms(rows, norm, axis=1),
            )
            for norm in NORMS
        }

    return program(measure, pair(), platform)


def pair(small: float = 1.0, large: float = 1.0) -> dict[str, np.ndarray]:
    """Gradients of some magnitudes."""
    return {"small": sample((7,), "float32", small), "large": sample(LARGE, "float32", large)}


@cpu_and_gpu
def test_every_norm_is_exact_by_leaf_by_row_and_together(platform):
    for magnitudes in itertools.product([1e-30, 1.0, 1e30], repeat=2):
        tree = pair(*magnitudes)
        for norm, (each, together, norms) in small_and_large(platform)(tree).items():
            summed = 0 if platform == "cpu" else 32
            for name, gradient in tree.items():
                check_group([each[name]], [gradient], norm, summed)
                exact = float(oracle.norm_of([gradient], norm))
                assert abs(float(norms[name]) / exact - 1) < (4 + summed) * 2.0**-23
            for result, row, measured in zip(
                np.asarray(each["rows"]), tree["large"], norms["rows"], strict=True
            ):
                check_group([result], [row], norm)
                assert abs(float(measured) / float(oracle.norm_of([row], norm)) - 1) < 1e-6
            check_group([together[name] for name in tree], [*tree.values()], norm, summed)


@cpu_and_gpu
def test_zeros_stay_zeros_of_their_sign(platform):
    tree = pair()
    tree["small"][:] = -0.0
    tree["large"][3] = -0.0
    for norm, (each, together, norms) in small_and_large(platform)(tree).items():
        for zeros in (each["small"], together["small"], np.asarray(each["rows"])[3]):
            np.testing.assert_array_equal(zeros, 0)
            assert np.signbit(zeros).all()
        assert norms["small"] == norms["rows"][3] == 0
        check_group([each["large"]], [tree["large"]], norm, 32)


@cpu_and_gpu
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_group_with_nan_or_an_infinity_is_nan_throughout_and_alone(bad, platform):
    for place, good in (("small", "large"), ("large", "small")):
        tree = pair()
        tree[place].reshape(-1, tree[place].shape[-1])[-1, 3] = bad
        for norm, (each, together, norms) in small_and_large(platform)(tree).items():
            assert np.isnan(each[place]).all()
            np.testing.assert_equal(float(norms[place]), abs(bad))
            check_group([each[good]], [tree[good]], norm, 32)
            assert all(np.isnan(x).all() for x in together.values())
            is_lost = np.isnan(each["rows"]).all(axis=1)
            assert np.isnan(each["rows"]).any(axis=1).sum() == is_lost.sum() == (place == "large")
            if place == "large":
                assert is_lost[-1]
                np.testing.assert_equal(float(norms["rows"][-1]), abs(bad))


@cpu_and_gpu
def test_slices_may_differ_by_seventy_decades_and_elements_of_one_too(platform):
    powers = 10.0 ** np.array([-35, -20, 0, 20, 36])
    rows = (sample((5, 40)) * powers[:, None]).astype(np.float32)
    tree = {
        "rows": rows,
        "columns": np.ascontiguousarray(rows.T).astype(jnp.bfloat16),
        "outer": (sample((30, 40, 5), "complex64") * powers).astype(np.complex64),
        "mixed": np.concatenate([sample((50,), "float32", x) for x in (1e-37, 1e-30, 3e25)]),
    }
    axes = {"rows": 1, "columns": 0, "outer": (0, 1), "mixed": 0}
    kept = {"rows": 0, "columns": 1, "outer": 2}
    results = program(lambda tree: every_norm(tree, axis=axes), tree, platform)(tree)
    for norm, name in itertools.product(NORMS, tree):
        groups = [np.asarray(results[norm][name]), tree[name]]
        if name in kept:
            groups = [np.moveaxis(x, kept[name], 0) for x in groups]
        for result, gradient in zip(*groups, strict=True) if name in kept else [groups]:
            check_group([result], [gradient], norm, summed=32)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_millions_of_elements_have_unit_norm(norm):
    gradient = np.random.default_rng(0).random((3000, 5000), np.float32)
    result = np.asarray(scaled(jnp.asarray(gradient), norm), np.float64)
    assert abs(np.linalg.norm(result.ravel(), int(norm[1])) - 1) < 1e-6


def test_more_elements_than_32_bits_count_are_traced():
    leaf = jax.ShapeDtypeStruct((2**17, 2**16), jnp.bfloat16)
    assert jax.eval_shape(every_norm, leaf) == dict.fromkeys(NORMS, leaf)


@cpu_and_gpu
def test_what_xla_knows_of_a_gradient_changes_nothing(platform):
    known = list(itertools.product([(), (4, 16)], [0.0, 1e-30, 1e25, 3e38]))

    def update(_):
        leaves = [jnp.full(shape, value) for shape, value in known]
        return {norm: scaled(leaves, norm) for norm in ("rms", "linf")}

    for norm, results in program(update, 0, platform)(0).items():
        for result, (shape, value) in zip(results, known, strict=True):
            gradient = np.full(shape, value, np.float32)
            if value:
                check_group([result], [gradient], norm)
            else:
                np.testing.assert_array_equal(result, gradient)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_number_times_a_leaf_is_not_taken_apart(platform):
    # XLA would multiply the number with the power of two of a sum, or with the root of rms.
    values = {1e15: 0, 1.01e15: 1e-36, 1e-9: 1e37, 1e30: 1e-30, 3e38: 1, 1e37: 1e-36}
    leaves = [jnp.full((3, 1500), value, jnp.float32) for value in values.values()]

    def update(leaves):
        multiplied = [x * jnp.float32(by) for x, by in zip(leaves, values, strict=True)]
        return [scaled(multiplied, "rms", axis=axis) for axis in (None, 0)]

    for results in program(update, leaves, platform)(leaves):
        for result, value in zip(results, values.values(), strict=True):
            np.testing.assert_allclose(result, 1.0 if value else 0.0, rtol=1e-5)


def test_groups_of_one_element_become_exactly_one_or_minus_one():
    tree = {
        "column": sample((500, 1), "bfloat16", 1e-3),
        "elements": sample((500,), "float16", 1e-3),
        "row": sample((1, 5000), "float32", 1e-3),
    }
    axes = {"column": 1, "elements": (), "row": 0}
    results = jax.jit(lambda tree: every_norm(tree, axis=axes))(tree)
    for norm, name in itertools.product(NORMS, tree):
        np.testing.assert_array_equal(results[norm][name], np.sign(tree[name]))
