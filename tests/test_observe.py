"""The norms that are logged are those of the gradients, by name."""

import functools
import inspect
import re
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from common import NORMS
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

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


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (gradient_norms, {"a": 2.0, "b": 3.0}),
        (functools.partial(gradient_norms, norm="rms", scope="global"), {"global": 1.0}),
    ],
    ids=["leaf", "global"],
)
def test_a_snapshot_in_the_chain_holds_the_norms_of_each_step(measure, expected):
    optimizer = optax.chain(optax.snapshot("grad_norms", measure), unit_scale(), optax.sgd(0.1))
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(9)}
    state = optimizer.init(params)

    def step(state, magnitude):
        gradients = jax.tree.map(lambda x: jnp.full_like(x, magnitude), params)
        updates, state = optimizer.update(gradients, state, params)
        return state, (updates, optax.tree.get(state, "grad_norms"))

    # A scan holds the state to its structure, shapes and dtypes.
    magnitudes = np.array([3.0, 4e25, 0.0], np.float32)
    _, (updates, logged) = jax.lax.scan(step, state, magnitudes)
    assert set(logged) == set(expected)
    for name, factor in expected.items():
        np.testing.assert_allclose(np.asarray(logged[name]), magnitudes * factor, rtol=RTOL)
    np.testing.assert_allclose(
        np.asarray(jax.tree.leaves(updates)[0])[:, 0, 0], [-0.05, -0.05, 0], rtol=RTOL
    )


@pytest.mark.parametrize(
    ("tree", "scope", "name"),
    [
        ({"a/b": np.ones(2), "a": {"b": np.ones(2)}}, "leaf", "a/b"),
        ({"a": np.ones(2), "b": np.ones(2)}, {"a": 1, "b": "1"}, "1"),
    ],
    ids=["paths", "labels"],
)
def test_two_groups_of_one_name_are_refused(tree, scope, name):
    text = rf"gradient_norms: several groups are named \['{name}'\]\. Rename a key"
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    with pytest.raises(ValueError, match=text):
        gradient_norms(tree, scope=scope)
    # The update needs no names, and the groups are two.
    result, _ = unit_scale("linf", scope=scope).update(tree, optax.EmptyState())
    assert all((np.asarray(x) == 1).all() for x in jax.tree.leaves(result))


def test_the_lines_of_the_docstring_write_what_tensorboard_reads(tmp_path):
    text = inspect.getdoc(gradient_norms) or ""
    (lines,) = re.findall(r"^( +for name, norm in norms.*\n.*)$", text, re.MULTILINE)
    lines = textwrap.dedent(lines)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    recorder = optax.snapshot("grad_norms", gradient_norms)
    optimizer = nnx.Optimizer(model, optax.chain(recorder, optax.sgd(0.1)), wrt=nnx.Param)
    expected = {"grad_norms/bias": [], "grad_norms/kernel": []}
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            gradients = nnx.grad(lambda model: jnp.sum(model(jnp.ones((4, 3))) ** 2))(model)
            optimizer.update(model, gradients)
            norms = optax.tree.get(optimizer.opt_state, "grad_norms")
            exec(lines, {"norms": norms, "writer": writer, "step": step})
            for name, gradient in nnx.to_pure_dict(gradients).items():
                norm = oracle.norm_of([np.asarray(gradient)], "l2")
                expected[f"grad_norms/{name}"].append(float(norm))
        kernels = gradient_norms({"kernel": np.eye(3, dtype=np.float32)}, axis=0)
        writer.add_histogram("grad_norms/rows", np.asarray(kernels["kernel"]), 0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        written = events.Scalars(name)
        assert [event.step for event in written] == [0, 1, 2]
        np.testing.assert_allclose([event.value for event in written], values, rtol=RTOL)
    (histogram,) = events.Histograms("grad_norms/rows")
    assert (histogram.histogram_value.num, histogram.histogram_value.max) == (3, 1)
