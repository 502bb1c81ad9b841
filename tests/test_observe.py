"""The norms that are logged are those of the gradients, by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from common import NORMS

from optax_unitscale import gradient_norms, unit_scale

# A sum, its root, its scale and the rounding to float32.
RTOL = 4 * 2.0**-23


def sample(*shape: int, magnitude: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * magnitude).astype(np.float32)


TREE = {
    "embedding": sample(5, 3, magnitude=1e-30),
    "head": sample(3, 4, magnitude=1e30, seed=1),
    "layers": [{"kernel": sample(3, 2, seed=2), "bias": sample(3, seed=3)}],
}
PATHS = ["embedding", "head", "layers/0/bias", "layers/0/kernel"]
GROUPS: dict[str, tuple[Any, dict[str, list[str]]]] = {
    "leaf": ("leaf", {path: [path] for path in PATHS}),
    "global": ("global", {"global": PATHS}),
    "labels": (
        {"embedding": "ends", "head": "ends", "layers": 7},
        {"ends": PATHS[:2], "7": PATHS[2:]},
    ),
}


def leaves_at(paths: list[str]) -> list[np.ndarray]:
    return [leaf for path, leaf in zip(PATHS, jax.tree.leaves(TREE), strict=True) if path in paths]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", GROUPS)
def test_each_group_has_one_float32_norm_under_its_name(norm, scope):
    argument, groups = GROUPS[scope]
    norms = gradient_norms(TREE, norm, scope=argument)
    assert set(norms) == set(groups)
    for name, paths in groups.items():
        assert (norms[name].dtype, norms[name].shape) == (jnp.float32, ())
        expected = float(oracle.norm_of(leaves_at(paths), norm))
        np.testing.assert_allclose(float(norms[name]), expected, rtol=RTOL)


@pytest.mark.parametrize("norm", NORMS)
def test_every_index_of_the_kept_axes_has_a_norm(norm):
    scope = {"embedding": "embedding", "head": "head", "layers": "layer"}
    axis = {"embedding": (0, 1), "head": 0, "layers": [{"kernel": -1, "bias": ()}]}
    norms = gradient_norms(TREE, norm, scope=scope, axis=axis)
    bias, kernel = leaves_at(PATHS[2:])
    expected = {
        "embedding": oracle.norm_of([TREE["embedding"]], norm),
        "head": [oracle.norm_of([column], norm) for column in TREE["head"].T],
        "layer": [oracle.norm_of([b, k], norm) for b, k in zip(bias, kernel, strict=True)],
    }
    assert set(norms) == set(expected)
    for name, values in expected.items():
        assert norms[name].dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(norms[name]), np.array(values, float), rtol=RTOL)


def test_the_names_of_arrays_alone_and_of_leaves_without_elements():
    assert list(gradient_norms(jnp.ones(4))) == ["updates"]
    assert list(gradient_norms(jnp.ones(4), scope="global")) == ["global"]
    empty = {"a": None, "b": optax.MaskedNode(), "c": jnp.zeros((0, 2)), "d": jnp.ones(4)}
    assert {name: float(norm) for name, norm in gradient_norms(empty).items()} == {"d": 2.0}


@pytest.mark.parametrize("norm", NORMS)
def test_zero_has_norm_zero_infinity_infinity_and_nan_nan(norm):
    values = {"zero": [0, 0], "inf": [1, -np.inf], "nan": [np.nan, 1], "both": [np.inf, np.nan]}
    tree = {name: np.array(value, np.float32) for name, value in values.items()}
    norms = {name: float(value) for name, value in gradient_norms(tree, norm).items()}
    np.testing.assert_equal(norms, {"zero": 0.0, "inf": np.inf, "nan": np.nan, "both": np.nan})


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_float32_for_every_dtype_and_inf_beyond_its_range(norm, x64):
    tree = {
        "bfloat16": jnp.full((4,), 3e38, jnp.bfloat16),
        "complex128": np.array([3e10 + 4e10j, 0]),
        "float16": np.full((4,), 3e4, np.float16),
        "huge": np.array([3e200, -4e200]),
        "tiny": np.array([3e-200, -4e-200]),
    }
    norms = gradient_norms(tree, norm)
    assert all(value.dtype == jnp.float32 for value in norms.values())
    for name, x in tree.items():
        exact = float(oracle.norm_of([np.asarray(x)], norm))
        expected = 0 if exact < 1e-100 else exact if exact < 3.4e38 else np.inf
        np.testing.assert_allclose(float(norms[name]), expected, rtol=RTOL)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", GROUPS)
def test_the_update_times_its_norm_is_the_gradient(norm, scope):
    argument, groups = GROUPS[scope]
    norms = gradient_norms(TREE, norm, scope=argument)
    updates, _ = unit_scale(norm, scope=argument).update(TREE, optax.EmptyState())
    owner = {path: float(norms[name]) for name, paths in groups.items() for path in paths}
    leaves = zip(PATHS, jax.tree.leaves(updates), jax.tree.leaves(TREE), strict=True)
    for path, update, gradient in leaves:
        product = np.asarray(update, np.float64) * owner[path]
        # Beside a norm of 1e30 an element of 1e-30 is below float32's normal range.
        lost = 2.0**-126 * owner[path]
        np.testing.assert_allclose(product, gradient, rtol=2 * RTOL, atol=lost)


@pytest.mark.parametrize("norm", NORMS)
def test_each_slice_times_its_norm_is_the_gradient(norm):
    norms = gradient_norms(TREE, norm, axis=-1)
    updates, _ = unit_scale(norm, axis=-1).update(TREE, optax.EmptyState())
    leaves = zip(PATHS, jax.tree.leaves(updates), jax.tree.leaves(TREE), strict=True)
    for path, update, gradient in leaves:
        product = np.asarray(update, np.float64) * np.asarray(norms[path])[..., None]
        np.testing.assert_allclose(product, gradient, rtol=2 * RTOL, atol=0)


def test_two_groups_of_one_name_are_refused():
    tree, scope = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, {"a": 1, "b": "1"}
    with pytest.raises(ValueError, match=r"gradient_norms: several groups are named \['1'\]\. Ren"):
        gradient_norms(tree, scope=scope)
    # The update needs no names, and the groups are two.
    result, _ = unit_scale("linf", scope=scope).update(tree, optax.EmptyState())
    assert all((np.asarray(x) == 1).all() for x in jax.tree.leaves(result))
