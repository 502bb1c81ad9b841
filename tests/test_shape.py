"""Factors of a layer's shape: their numbers, and what they do to a layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import EMPTY, factors, shaped, shapes
from flax import linen as nn
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Axes

from optax_unitscale import Kernel, unit_scale


@pytest.mark.parametrize(
    ("rule", "widening", "narrowing", "vector"),
    [
        ("spectral", 2, 0.5, 8),
        ("muon", 2, 1, 8),
        ("consistent_rms", 1.6, 1.6, 1.6),
        ("sign", 1 / 16, 1 / 64, 1),
    ],
)
def test_each_rule_has_its_papers_factor(rule, widening, narrowing, vector):
    """From 16 features to 64 and from 64 to 16, and of 64 at once."""
    found = factors({"up": shapes(kernel=(16, 64), bias=(64,))}, rule)
    assert found == pytest.approx({"up/kernel": widening, "up/bias": vector})
    assert factors(shapes(kernel=(64, 16)), rule) == pytest.approx({"kernel": narrowing})


class NNXModel(nnx.Module):
    """One of each layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(9, 36, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 18, 8, 32, decode=False, rngs=rngs)
        self.conv = nnx.Conv(4, 9, (3, 3), rngs=rngs)
        self.tokens = nnx.Embed(11, 25, rngs=rngs)
        self.norm = nnx.LayerNorm(49, rngs=rngs)
        self.cell = nnx.SimpleCell(1, 16, rngs=rngs)
        self.slope = nnx.Param(jnp.ones(()))


# By hand: √(36/9), √36, √(8/18), √8, √(32/8), √32, √(9/36), √9, √25, √49.
LAYERS = {
    "dense/kernel": 2,
    "dense/bias": 6,
    **{f"attention/{name}/kernel": 2 / 3 for name in ("query", "key", "value")},
    **{f"attention/{name}/bias": math.sqrt(8) for name in ("query", "key", "value")},
    "attention/out/kernel": 2,
    "attention/out/bias": math.sqrt(32),
    "tokens/embedding": 5,
    "norm/scale": 7,
    "norm/bias": 7,
}


def test_nnxs_layers_are_known():
    model = nnx.eval_shape(lambda: NNXModel(nnx.Rngs(0)))
    cell = {"cell/dense_i/kernel": 4, "cell/dense_i/bias": 4, "cell/dense_h/kernel": 1}
    conv = {"conv/kernel": 0.5, "conv/bias": 3}
    found = factors(nnx.state(model, nnx.Param))
    assert found == pytest.approx({**LAYERS, **conv, **cell, "slope": 1})


def test_numbers_of_some_of_nnxs_leaves_leave_the_others_to_the_default():
    """As `optax.contrib.muon` takes them: a callable that maps over the parameters."""

    def turned(params: Any) -> Any:
        return jax.tree.map(lambda x: Axes(1, 0) if x.shape == (9, 36) else None, params)

    params = nnx.state(nnx.eval_shape(lambda: NNXModel(nnx.Rngs(0))), nnx.Param)
    found, expected = factors(params, dimension_numbers=turned), factors(params)
    assert found == pytest.approx({**expected, "dense/kernel": 0.5})
    assert factors(params, dimension_numbers=turned(params)) == pytest.approx(found)


def rank_one(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of unit norm and rank, and the input of RMS 1 that it does most to."""
    rng = np.random.default_rng(n_in)
    left, right = rng.normal(size=n_in), rng.normal(size=n_out)
    left, right = left / np.linalg.norm(left), right / np.linalg.norm(right)
    return np.outer(left, right), left * np.sqrt(n_in)


@pytest.mark.parametrize("width", [16, 128])
def test_a_unit_update_changes_any_layers_output_by_an_rms_of_one(width):
    """Run through Flax's layers, whose other parameters are zero."""
    heads, context = width // 8, 3
    row = rank_one(1, width)[0][0]
    table = np.zeros((11, width))
    table[4] = row
    dense = nn.DenseGeneral
    # The layer, its parameter, the unit update of that, and the input.
    cases: list[tuple[str, nn.Module, str, np.ndarray, np.ndarray]] = []
    for n_in, n_out in [(8, width), (width, width), (width, 8)]:
        cases.append(("dense", nn.Dense(n_out), "kernel", *rank_one(n_in, n_out)))
    kernel, x = rank_one(width, 8 * heads)
    split = dense((heads, 8))
    cases.append(("query", split, "kernel", kernel.reshape(width, heads, 8), x))
    kernel, x = rank_one(8 * heads, width)
    merge = dense(width, axis=(-2, -1))
    cases.append(("out", merge, "kernel", kernel.reshape(heads, 8, width), x.reshape(heads, 8)))
    kernel, x = rank_one(3 * 3 * 4, width)
    conv = nn.Conv(width, (3, 3), padding="VALID")
    cases.append(("conv", conv, "kernel", kernel.reshape(3, 3, 4, width), x.reshape(3, 3, 4)))
    cases.append(("tokens", nn.Embed(11, width), "embedding", table, np.array(4)))
    cases.append(("bias", nn.Dense(width), "bias", row, np.ones(context)))
    # Spread over all elements, as a gain's mostly is.
    gain = np.sign(row) / np.sqrt(width)
    cases.append(("norm", nn.RMSNorm(epsilon=0), "scale", gain, np.sign(rank_one(width, 1)[1])))
    for name, layer, leaf, update, x in cases:
        x = jnp.asarray(x, jnp.int32 if name == "tokens" else jnp.float32)
        params: Any = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        changed: Any = {k: np.zeros(like.shape, np.float32) for k, like in params.items()}
        changed[leaf] = np.float32(update)
        # By itself it could be stacked layers.
        layers: Any = {"out/kernel": Kernel((0, 1), 2)} if name == "out" else None
        change: Any = layer.apply({"params": shaped({name: changed}, layers=layers)[name]}, x)
        rms = np.sqrt(np.mean(np.square(np.asarray(change))))
        np.testing.assert_allclose(rms, 1, rtol=1e-5, err_msg=f"{name} of {update.shape}")


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_what_an_orthogonalised_update_becomes_is_what_the_docstring_says(shape):
    left, _, right = np.linalg.svd(np.random.default_rng(0).normal(size=shape), False)
    update, least = np.float32(left @ right), min(shape)

    def result(rule, update: Any = update):
        return np.asarray(shaped({"kernel": update}, rule)["kernel"])

    largest = {rule: np.linalg.norm(result(rule), 2) for rule in ("spectral", "muon")}
    ratio = math.sqrt(shape[1] / shape[0])
    assert largest == pytest.approx({"spectral": ratio, "muon": max(1, ratio)}, rel=1e-5)
    rms = np.sqrt(np.mean(result("consistent_rms") ** 2))
    assert rms == pytest.approx(0.2, rel=1e-5)
    # Only of unit norm, it falls short by the root of its rank.
    unit = np.asarray(unit_scale().update(update, EMPTY)[0])
    assert np.linalg.norm(result("spectral", unit), 2) == pytest.approx(ratio / least**0.5, 1e-5)
    rms = np.sqrt(np.mean(result("consistent_rms", unit) ** 2))
    assert rms == pytest.approx(0.2 / least**0.5, rel=1e-5)


def test_signs_over_the_inputs_change_no_output_by_more_than_one():
    rng = np.random.default_rng(0)
    signs = np.float32(np.sign(rng.normal(size=(64, 16))))
    kernel = np.asarray(shaped({"kernel": signs}, "sign")["kernel"])
    worst = signs.T  # Inputs of RMS 1, each the worst for one output.
    np.testing.assert_allclose(np.abs(worst @ kernel).max(axis=1), 1, rtol=1e-5)
