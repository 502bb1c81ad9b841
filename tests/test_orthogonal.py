"""`orthogonalize`: singular values of one, at any magnitude, matrix by matrix, on any mesh."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import EMPTY, compilations
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, shard, shard_map

from optax_unitscale import Kernel, orthogonalize

# How far from 1 five steps leave the singular values of a well-conditioned matrix.
WITHIN = {"polar_express": (0.85, 1.15), "muon": (0.65, 1.25), "aol": (0.6, 1.35)}


def orthogonal(tree: Any, **options: Any) -> Any:
    return orthogonalize(**options).update(tree, EMPTY)[0]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def polar(x: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ v


def values(x: Any) -> np.ndarray:
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@pytest.mark.parametrize("coefficients", WITHIN)
def test_singular_values_come_near_one_and_the_vectors_stay(coefficients):
    shapes = [(24, 24), (16, 40), (40, 16)]
    tree = {f"w{i}": {"kernel": draw(*shape, seed=i)} for i, shape in enumerate(shapes)}
    # Ill-conditioned by 30 at most, as Newton-Schulz is made for.
    for leaf in tree.values():
        u, s, v = np.linalg.svd(leaf["kernel"], full_matrices=False)
        leaf["kernel"] = ((u * np.linspace(1, 1 / 30, len(s))) @ v).astype(np.float32)
    low, high = WITHIN[coefficients]
    for name, result in orthogonal(tree, coefficients=coefficients).items():
        x, y = tree[name]["kernel"].astype(np.float64), np.asarray(result["kernel"], np.float64)
        u, _, v = np.linalg.svd(x, full_matrices=False)
        core = u.T @ y @ v.T
        if coefficients != "aol":  # Its scaling of rows turns the vectors a little.
            np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-4)
        assert values(y).min() > low
        assert values(y).max() < high


def test_more_steps_of_polar_express_reach_the_polar_factor():
    x = draw(30, 20)
    result = orthogonal({"kernel": x}, steps=9)["kernel"]
    np.testing.assert_allclose(result, polar(x), atol=2e-5)


def test_any_magnitude_gives_the_same_where_optax_adds_its_epsilon():
    x = draw(16, 24)
    expected = orthogonal({"kernel": x})["kernel"]
    axes: Any = {"kernel": optax.contrib.MuonDimensionNumbers(0, 1)}
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=axes)
    for magnitude in (2.0**-110, 2.0**-50, 2.0**70, 2.0**110):
        leaf = {"kernel": jnp.asarray(x * np.float32(magnitude))}
        np.testing.assert_allclose(orthogonal(leaf)["kernel"], expected, atol=1e-5)
        with jax.numpy_dtype_promotion("standard"):
            peer: Any = muon.update(leaf, muon.init(leaf))[0]
        assert not np.linalg.norm(peer["kernel"]) > 1  # Ours is 4.
    tiny = {"kernel": np.full((8, 8), 1e-37, np.float32)}
    assert 0.85 < values(orthogonal(tiny)["kernel"]).max() < 1.15


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_leaves_keep_their_dtype_and_are_rounded_once(dtype):
    x = draw(16, 24).astype(jnp.dtype(dtype))
    result = orthogonal({"kernel": x})["kernel"]
    assert result.dtype == x.dtype
    exact = orthogonal({"kernel": x.astype(np.float32)})["kernel"]
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(result.astype(np.float32), exact, atol=eps)


def test_zero_stays_zero_and_nan_or_an_infinity_is_nan_in_its_matrix_only():
    x = draw(5, 8, 12)
    x[1] = 0
    x[2, 3, 4] = np.nan
    x[3, 0, 0] = np.inf
    x[4] = np.outer(draw(8, seed=1), draw(12, seed=2))
    result = np.asarray(orthogonal({"w": x}, layers={"w": Kernel(1, 2)})["w"])
    np.testing.assert_array_equal(result[1], 0)
    assert np.isnan(result[2:4]).all()
    assert values(result[0]).min() > 0.8
    rank_one = values(result[4])
    assert 0.85 < rank_one[0] < 1.15
    assert rank_one[1] < 1e-3


def test_a_row_and_a_column_are_divided_by_their_norm_and_other_kinds_pass():
    tree = {
        "row": {"kernel": draw(1, 9)},
        "column": {"kernel": draw(9, 1)},
        "bias": draw(4),
        "embedding": draw(5, 6),
        "none": None,
    }
    result = orthogonal(tree)
    for name in ("row", "column"):
        x = tree[name]["kernel"]
        ratio = np.asarray(result[name]["kernel"]) / (x / np.linalg.norm(x))
        np.testing.assert_allclose(ratio, ratio.ravel()[0], rtol=1e-5)
        assert 0.85 < ratio.ravel()[0] < 1.15
    for name in ("bias", "embedding"):
        np.testing.assert_array_equal(result[name], tree[name])
    assert result["none"] is None


def test_stacked_layers_and_blocks_are_matrices_of_their_own():
    x = draw(3, 8, 12)
    stack = orthogonal({"w": x}, layers={"w": Kernel(1, 2)})["w"]
    for matrix, own in zip(np.asarray(stack), x, strict=True):
        np.testing.assert_allclose(matrix, orthogonal({"kernel": own})["kernel"], atol=1e-5)
    side = np.concatenate(list(x), axis=1)
    blocks = orthogonal({"w": side}, layers={"w": Kernel(0, 1, blocks=3)})["w"]
    np.testing.assert_allclose(blocks, np.concatenate(list(np.asarray(stack)), axis=1), atol=1e-5)
    heads = orthogonal({"w": x.reshape(3, 8, 3, 4)}, layers={"w": Kernel(1, (2, 3))})["w"]
    np.testing.assert_allclose(heads.reshape(3, 8, 12), stack, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_kernels_give_the_numbers_of_one_device_and_keep_their_layout(kind):
    tree = {f"w{i}": {"kernel": draw(16, 24, seed=i)} for i in range(9)}
    specs = {f"w{i}": {"kernel": P("a") if i % 2 else P(None, ("a", "b"))} for i in range(9)}
    with jax.set_mesh(mesh := make_mesh(kind)):
        inputs = shard(tree, mesh, specs)
        update = jax.jit(orthogonal).lower(inputs).compile()
        result = update(inputs)
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(inputs), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, 2)
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(orthogonal(tree)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    # 9 matrices on 8 devices: two each, and not nine.
    stacks = [int(n) for n in re.findall(r"f32\[(\d+),16,24\]", str(update.as_text()))]
    assert 2 in stacks


def test_a_kernel_that_shard_map_splits_is_refused():
    update = shard_map(lambda tree: orthogonal(tree), (P("a"),), P("a"))
    with pytest.raises(ValueError, match=r"orthogonalize: updates\['kernel'\] .* Gather it first"):
        update({"kernel": jnp.ones((8, 4))})


def test_what_is_unknown_is_refused_at_init_and_arguments_at_once():
    with pytest.raises(ValueError, match=r"(?s)orthogonalize: .*codebook"):
        orthogonalize().init({"codebook": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match="coefficients is 'newton', expected one of"):
        orthogonalize(coefficients="newton")
    with pytest.raises(ValueError, match="has 1 triples for 5 steps"):
        orthogonalize(coefficients=((2.0, -1.5, 0.5),))
    with pytest.raises(TypeError, match=r"steps is .* static_args"):
        optax.inject_hyperparams(orthogonalize)(steps=5).init({"kernel": jnp.ones((2, 2))})


def test_it_compiles_once_and_zero_has_a_finite_derivative():
    tree = {"kernel": jnp.asarray(draw(8, 8))}
    orthogonal(tree)
    before = compilations()
    orthogonal(tree)
    assert compilations() == before
    slope = jax.grad(lambda x: jnp.sum(orthogonal({"kernel": x})["kernel"]))(jnp.zeros((4, 4)))
    assert np.isfinite(slope).all()
