"""`unit_sgd` and `unit_muon`: one line for any model, and the right thing for every leaf."""

import functools
import pathlib
import subprocess
import sys
from collections.abc import Hashable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

from optax_unitscale import Kernel, keep_norm, layers_of, stacked, unit_muon, unit_sgd

HERE = pathlib.Path(__file__).parent
OPTIMIZERS = {
    "unit_sgd": lambda: unit_sgd(0.03, weight_decay=0.1),
    "unit_muon": lambda: unit_muon(0.03, weight_decay=0.1),
    "unit_muon, norms kept": lambda: unit_muon(0.03, keep_norm=True),
}
X = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
Y = np.tanh(X @ np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32))
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def loss_of(predictions: Any) -> Any:
    return jnp.mean((predictions - Y) ** 2)


def updates_of(tx: Any, gradient: Any, params: Any = None) -> Any:
    """Those of the first step."""
    state = tx.init(gradient if params is None else params)
    return jax.jit(tx.update)(gradient, state, params)[0]


def check_learns(step: Any, steps: int = 40) -> None:
    losses = [float(step()) for _ in range(steps)]
    assert losses[-1] < 0.5 * losses[0]


@every_optimizer
def test_nnx_models_learn(make):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), jnp.tanh, nnx.Linear(32, 3, rngs=rngs))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: loss_of(model(X)))(model)
        optimizer.update(model, gradient)
        return loss

    check_learns(lambda: step(model, optimizer))


class Linen(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        """The output of the second."""
        return nn.Dense(3)(jnp.tanh(nn.Dense(32)(x)))


@every_optimizer
def test_linen_models_learn(make):
    model = Linen()
    params = model.init(jax.random.key(0), X)["params"]
    states = [TrainState.create(apply_fn=model.apply, params=params, tx=make())]

    @jax.jit
    def step(state):
        loss, gradient = jax.value_and_grad(lambda p: loss_of(model.apply({"params": p}, X)))(
            state.params
        )
        return loss, state.apply_gradients(grads=gradient)

    def advance():
        loss, state = step(states[-1])
        states.append(state)
        return loss

    check_learns(advance)


def check_functional(params: Any, apply: Any, tx: Any) -> None:
    state = [params, tx.init(params)]

    @jax.jit
    def step(params, opt_state):
        loss, gradient = jax.value_and_grad(lambda params: loss_of(apply(params)))(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return loss, optax.apply_updates(params, updates), opt_state

    def advance():
        loss, *state[:] = step(*state)
        return loss

    check_learns(advance)


@every_optimizer
def test_equinox_models_learn(make):
    model = eqx.nn.MLP(8, 3, 32, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    check_functional(params, lambda params: jax.vmap(eqx.combine(params, static))(X), make())


@every_optimizer
def test_haiku_models_learn(make):
    model = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([32, 3], activation=jnp.tanh)(x))
    )
    params = model.init(jax.random.key(0), X)
    check_functional(params, lambda params: model.apply(params, X), make())


def test_each_kind_of_leaf_gets_its_step():
    params = {
        "embed": {"embedding": jnp.ones((5, 16))},
        "up": {"kernel": jnp.ones((16, 64)), "bias": jnp.ones(64)},
        "blocks": {"kernel": jnp.ones((3, 16, 4))},
    }
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    updates = updates_of(unit_muon(1.0, layers={"blocks/kernel": Kernel(1, 2)}), gradient)
    up, embed, blocks = (updates[name] for name in ("up", "embed", "blocks"))
    spectral = np.linalg.svd(np.asarray(up["kernel"]), compute_uv=False)
    np.testing.assert_allclose(spectral, 2, rtol=0.15)
    for matrix in np.asarray(blocks["kernel"]):
        np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False), 0.5, rtol=0.15)
    np.testing.assert_allclose(np.linalg.norm(embed["embedding"], axis=1), 4, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(up["bias"]), 0.8, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(dtype, [0, 100, -100, 50, -90, 20]) for dtype in ("float32", "bfloat16")]
    + [("float16", [0, 13, -4, 0, 12, 13])],
)
def test_how_long_a_gradient_was_does_not_count(dtype, exponents):
    rng = np.random.default_rng(0)
    shapes = {"embed": {"embedding": (5, 16)}, "up": {"kernel": (16, 8), "bias": (8,)}}
    shapes |= {"blocks": {"kernel": (3, 16, 4)}}
    layers = {"blocks/kernel": Kernel(1, 2)}
    gradients = [
        jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple))
        for _ in exponents
    ]

    def steps(magnitudes: Any) -> Any:
        tx, updates = unit_muon(1.0, layers=layers), []
        state = tx.init(jax.tree.map(lambda x: jnp.asarray(x, dtype), gradients[0]))
        for gradient, magnitude in zip(gradients, magnitudes, strict=True):
            scaled = jax.tree.map(lambda x, by=magnitude: jnp.asarray(x * by, dtype), gradient)
            update, state = tx.update(scaled, state)
            updates.append(update)
        return updates

    lengths = 2.0 ** np.array(exponents)
    pairs = zip(jax.tree.leaves(steps(lengths)), jax.tree.leaves(steps(np.ones(6))), strict=True)
    for one, two in pairs:
        # A power of two changes what `unit_scale` gives by at most 3 units.
        tolerance = 4 * float(jnp.finfo(dtype).eps * jnp.max(jnp.abs(two)))
        np.testing.assert_allclose(one.astype(float), two.astype(float), atol=tolerance)


def test_unknown_leaves_are_refused_at_init_all_of_them_with_the_line_to_write():
    params = {"qkv": {"kernel": jnp.ones((8, 3, 2, 4))}, "codebook": jnp.ones((4, 8))}
    with pytest.raises(ValueError, match=r"(?s)unit_muon: .*codebook.*qkv/kernel"):
        unit_muon(0.1).init(params)
    known = {"qkv/kernel": Kernel(0, (2, 3)), "codebook": "embedding"}
    updates = updates_of(unit_muon(0.1, layers=known), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_parameters_show_the_layers_where_updates_are_missing():
    # A convolution of two axes, which its bias shows.
    params: Any = {"down": {"kernel": jnp.ones((3, 5, 4, 8)), "bias": jnp.ones(8)}}
    part = {"down": {"kernel": params["down"]["kernel"], "bias": None}}
    tx = unit_muon(0.1)
    updates: Any = tx.update(part, tx.init(params), params)[0]
    wanted = updates_of(tx, params, params)
    np.testing.assert_allclose(updates["down"]["kernel"], wanted["down"]["kernel"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"unit_muon: the updates have \['up/bias'\], and params"):
        tx.update({"up": {"bias": jnp.ones(8)}}, tx.init(params), params)


@pytest.mark.parametrize("make", [unit_muon, unit_sgd])
def test_a_momentum_that_is_no_number_is_refused(make):
    with pytest.raises(TypeError, match=r"momentum is <.*expected a real number\. A schedule goes"):
        make(0.1, momentum=optax.constant_schedule(0.9))


@pytest.mark.parametrize("make", [unit_muon, unit_sgd])
def test_integers_are_refused_by_name(make):
    tree = {"dense": {"kernel": jnp.eye(2)}, "step": jnp.arange(3)}
    tx = make(0.1)
    with pytest.raises(TypeError, match=r"updates\['step'\] has dtype int32, expected a floating"):
        tx.update(tree, tx.init(tree), tree)


def test_weights_decay_apart_from_the_gradient_and_kernels_only_unless_masked():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    masks: Any = (
        ({}, {"kernel": True, "bias": False}),
        ({"mask": {"kernel": False, "bias": True}}, {"kernel": False, "bias": True}),
        ({"mask": lambda tree: jax.tree.map(lambda _: True, tree)}, {"kernel": 1, "bias": 1}),
    )
    for make in (unit_sgd, unit_muon):
        for options, decays in masks:
            updates = updates_of(make(0.1, weight_decay=0.5, **options), zeros, params)
            for name, does in decays.items():
                np.testing.assert_allclose(updates[name], -0.15 * bool(does), rtol=1e-6)


@pytest.mark.parametrize("make", [unit_sgd, unit_muon])
def test_a_mask_that_a_wrapper_has_called_is_refused(make):
    def mask(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, tree)

    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    wrapped = functools.partial(optax.inject_hyperparams(make), 0.1, weight_decay=0.5)
    with pytest.raises(ValueError, match=r"mask is .*, expected a tree .*static_args=\('mask',\)"):
        wrapped(mask=lambda _: True).init(params)
    static = optax.inject_hyperparams(make, static_args=("mask",))
    updates = updates_of(static(0.1, weight_decay=0.5, mask=mask), params, params)
    plain = updates_of(make(0.1, weight_decay=0.5, mask=mask), params, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, plain)


def test_kernels_keep_their_norms_where_asked():
    params: Any = {"kernel": jnp.asarray(X), "bias": jnp.zeros(8)}
    tx = unit_muon(0.1, keep_norm=True)
    state = tx.init(params)
    for seed in range(3):
        gradient = {"kernel": jax.random.normal(jax.random.key(seed), (64, 8)), "bias": jnp.ones(8)}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert abs(np.linalg.norm(params["kernel"]) / np.linalg.norm(X) - 1) < 1e-6


def test_the_momentum_has_the_dtype_that_is_asked_for():
    params = {"kernel": jnp.ones((4, 4))}
    for tx in (unit_muon(0.1, mu_dtype="bfloat16"), unit_sgd(0.1, accumulator_dtype="bfloat16")):
        dtypes = {x.dtype for x in jax.tree.leaves(tx.init(params))}
        assert jnp.dtype("bfloat16") in dtypes
        # Optax adds bfloat16 momentum to a float32 gradient.
        with jax.numpy_dtype_promotion("standard"):
            updates = updates_of(tx, params)
        assert updates["kernel"].dtype == jnp.float32


def test_rows_of_embeddings_come_to_rest_where_their_token_is_seen_no_more():
    params = [jnp.ones((8, 16))]
    gradients = np.random.default_rng(0).normal(size=(100, 8, 16))
    gradients[1:, 0] = 0
    tx: Any = unit_muon(1.0, layers={"0": "embedding"})

    def step(state: Any, gradient: Any) -> Any:
        (update,), state = tx.update([gradient], state, params)
        return state, jnp.sqrt(jnp.mean(jnp.asarray(update) ** 2, axis=1))

    _, moved = jax.lax.scan(step, tx.init(params), jnp.asarray(gradients, jnp.float32))
    np.testing.assert_allclose(moved[:, 1:], 1, rtol=1e-5)
    np.testing.assert_allclose(moved[:40, 0], 1, rtol=1e-5)
    assert moved[-1, 0] < 0.01
    assert moved[:, 0].sum() < 70


def test_experts_without_a_gradient_come_to_rest_and_the_others_do_not():
    shapes = {"kernel": (2, 8, 16), "bias": (2, 16)}
    rng = np.random.default_rng(0)
    gradients = {name: rng.normal(size=(100, *shape)) for name, shape in shapes.items()}
    for gradient in gradients.values():
        gradient[1:, 0] = 0
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    tx: Any = unit_muon(1.0, layers=layers_of(params, stacked="**"))

    def step(state: Any, gradient: Any) -> Any:
        update, state = tx.update(gradient, state)
        lengths = jnp.linalg.norm(update["kernel"], ord=2, axis=(1, 2))
        return state, (lengths, jnp.linalg.norm(update["bias"], axis=1))

    xs = jax.tree.map(jnp.float32, gradients)
    _, (kernels, biases) = jax.lax.scan(step, tx.init(params), xs)
    np.testing.assert_allclose(kernels[:60], np.sqrt(2), rtol=0.15)
    np.testing.assert_allclose(kernels[:, 1], np.sqrt(2), rtol=0.15)
    np.testing.assert_array_equal(kernels[70:, 0], 0)
    np.testing.assert_allclose(biases[:60], 0.4, rtol=1e-5)
    np.testing.assert_allclose(biases[:, 1], 0.4, rtol=1e-5)
    assert (biases[90:, 0] < 0.04).all()


def test_stacked_layers_take_steps_of_their_own():
    tree = {"blocks": {"kernel": jnp.stack([1e-3 * jnp.eye(4), jnp.eye(4)])}, "head": jnp.ones(3)}
    updates = updates_of(unit_sgd(1.0, axis=stacked("blocks/**")), tree)
    steps = jnp.linalg.norm(updates["blocks"]["kernel"], axis=(1, 2))
    np.testing.assert_allclose(steps, 1, rtol=1e-6)


def test_embeddings_can_be_left_to_adam():
    params = {"embed": {"embedding": jnp.ones((8, 4))}, "dense": {"kernel": jnp.eye(4)}}
    layers = layers_of(params)
    tx = unit_muon(0.03, layers=layers)
    rules: dict[Hashable, Any] = {"embedding": optax.adam(1e-4), "kernel": tx, "vector": tx}
    both = optax.partition(rules, lambda tree: layers.map(lambda x: x.kind, tree))
    alone = updates_of(tx, params)
    with jax.numpy_dtype_promotion("standard"):  # Adam mixes an integer count with floats.
        with_adam = updates_of(both, params)
    np.testing.assert_allclose(alone["embed"]["embedding"], -0.03, rtol=1e-5)
    np.testing.assert_allclose(with_adam["embed"]["embedding"], -1e-4, rtol=1e-3)
    np.testing.assert_array_equal(alone["dense"]["kernel"], with_adam["dense"]["kernel"])


def test_leaves_with_reduced_axes_keep_them():
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        x = jax.device_put(jnp.eye(8, 4), P(None, "b", reduced=frozenset("a")))
        result = jax.jit(lambda x: updates_of(unit_muon(0.1), {"kernel": x}))(x)["kernel"]
    assert result.sharding == x.sharding
    np.testing.assert_allclose(
        result, updates_of(unit_muon(0.1), {"kernel": jnp.eye(8, 4)})["kernel"], rtol=1e-5
    )


def test_parts_of_leaves_in_shard_map_are_refused_all_of_them_and_whole_ones_work():
    mesh = make_mesh()
    params = {"embed": {"embedding": jnp.ones((8, 4))}, "dense": {"bias": jnp.ones(4)}}
    tx = unit_muon(0.03)

    def eager(tree: Any) -> Any:
        return tx.update(tree, tx.init(tree))[0]

    def step(spec: Any, **options: Any) -> Any:
        specs = {"in_specs": (spec,), "out_specs": spec}
        return jax.shard_map(eager, mesh=mesh, **specs, **options)

    parts = {"embed": {"embedding": P("a")}, "dense": {"bias": P("b")}}
    with pytest.raises(ValueError, match=r"unit_muon: .*'dense/bias', 'embed/embedding'.* vary"):
        step(parts)(params)
    for options in ({}, {"check_vma": False}):
        jax.tree.map(np.testing.assert_array_equal, step(P(), **options)(params), eager(params))


def test_layers_of_an_equinox_model_serve_its_filtered_parameters():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    layers = layers_of(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    both = [updates_of(tx, params) for tx in (unit_muon(0.1), unit_muon(0.1, layers=layers))]
    jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.parametrize("make", [unit_muon, functools.partial(unit_sgd, weight_decay=0.1)])
def test_an_equinox_model_may_be_given_whole_or_partly_frozen(make):
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    params: Any = eqx.filter(model, eqx.is_inexact_array)
    part: Any = eqx.tree_at(lambda tree: tree.layers[0].weight, params, None)
    tx: Any = make(0.1)
    wanted = updates_of(tx, params, params)
    whole, _ = tx.update(params, tx.init(params), model)
    frozen, _ = tx.update(part, tx.init(params), params)
    for result in (whole, frozen):
        np.testing.assert_allclose(result.layers[1].weight, wanted.layers[1].weight, rtol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [
        unit_muon(0.1, layers={"a/kernel": Kernel(0, 1)}, keep_norm=True),
        keep_norm(axis={"a": {"kernel": 0}}),
        keep_norm(axis=stacked("a/**")),
    ],
)
def test_map_params_finds_the_state_whatever_the_layers_are(tx):
    params = {"a": {"kernel": jnp.eye(4)}}
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    jax.tree.map(np.testing.assert_array_equal, mapped, state)


class BatchNormCNN(nnx.Module):
    """A small network in which a bias stands before each BatchNorm."""

    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(i, 16, (3, 3), rngs=rngs) for i in (1, 16)])
        self.norms = nnx.List([nnx.BatchNorm(16, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(16 * 4, 10, rngs=rngs)

    def __call__(self, x):
        """Logits."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.head(x.reshape(len(x), -1))


def test_a_bias_before_batch_norm_does_no_harm():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    labels, train = digits.target, 1400

    @nnx.jit
    def gradient_of(model, x, y):  # Compiled once for all optimizers.
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        return nnx.grad(loss)(model)

    def accuracy(tx):
        model = BatchNormCNN(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx(model), wrt=nnx.Param)
        step = nnx.jit(lambda model, optimizer, gradient: optimizer.update(model, gradient))
        rng = np.random.default_rng(0)
        for _ in range(150):
            rows = rng.integers(0, train, 64)
            step(model, optimizer, gradient_of(model, images[rows], labels[rows]))
        model.eval()
        return np.mean(np.argmax(model(images[train:]), axis=1) == labels[train:])

    # Per leaf the bias takes a full step of noise each time.
    per_leaf = accuracy(lambda _: unit_sgd(0.03, scope="leaf"))
    per_layer = accuracy(lambda _: unit_sgd(0.03))
    muon = accuracy(lambda model: unit_muon(0.03, layers=layers_of(model)))
    assert per_layer > 0.85
    assert muon > 0.85
    assert per_leaf < per_layer


@pytest.mark.slow
def test_they_pass_the_common_tests_of_optax():
    command = [sys.executable, str(HERE / "optax_common.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "OK" in done.stderr
