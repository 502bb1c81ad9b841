"""A GPT trained on a mesh of 4 by 2 devices follows the one trained on a single device."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.models.gpt import GPT, GPTConfig
from optax_unitscale import unit_scale

pytestmark = pytest.mark.slow

CONFIG = GPTConfig(vocabulary=16, context=8, depth=1, heads=2, width=16)
STEPS, BATCH = 20, 16
AXES = ("data", "model")


def labels(updates):
    """All matrices share one norm, and every other leaf has its own: both kinds of scope."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: "matrices" if x.ndim > 1 else name_of(path), updates
    )


OPTIMIZER = optax.chain(unit_scale(scope=labels), optax.sgd(0.05, momentum=0.9))


class Run(NamedTuple):
    """The loss before each step, and the parameters after the last."""

    losses: np.ndarray
    params: Any


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_batches():
    """Sequences that count up by one, two or three, from anywhere."""
    rng = np.random.default_rng(0)
    start, pace = rng.integers(16, size=(STEPS, BATCH, 1)), rng.integers(1, 4, (STEPS, BATCH, 1))
    return ((start + pace * np.arange(CONFIG.context + 1)) % CONFIG.vocabulary).astype(np.int32)


# Shapes only: every test process imports this file.
GRAPH, PARAMS = nnx.split(nnx.eval_shape(lambda: GPT(CONFIG, nnx.Rngs(0))), nnx.Param)
BATCHES = make_batches()


@functools.cache
def first_params():
    return nnx.state(GPT(CONFIG, nnx.Rngs(0)), nnx.Param)


def loss_of(params, tokens):
    logits = nnx.merge(GRAPH, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


GRADIENT = jax.value_and_grad(loss_of)


def take_step(gradient, params, state, tokens):
    loss, updates = gradient(params, tokens)
    updates, state = OPTIMIZER.update(updates, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(step: Callable[..., Any], params: Any, batches: Any) -> Run:
    state, losses = OPTIMIZER.init(params), []
    for tokens in batches:
        params, state, loss = step(params, state, tokens)
        losses.append(float(loss))
    return Run(np.array(losses), params)


def distance(one: Run, other: Run) -> float:
    """The largest difference between two runs' losses and parameters, all of which are near 1."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


@pytest.fixture(scope="module")
def single() -> tuple[Run, float]:
    """The run on one device, and how far from it a run goes that starts one rounding away."""
    step = jax.jit(functools.partial(take_step, GRADIENT))
    params = first_params()
    run = train(step, params, BATCHES)
    rng = np.random.default_rng(1)
    signs = jax.tree.map(lambda x: rng.choice(np.array([-1, 1], np.float32), x.shape), params)
    nearby = jax.tree.map(lambda x, sign: x * (1 + sign * np.float32(2.0**-23)), params, signs)
    return run, distance(run, train(step, nearby, BATCHES))


def check_follows(run: Run, single: tuple[Run, float]) -> None:
    expected, rounding = single
    assert expected.losses[-1] < 0.7 * expected.losses[0]
    # Sums in another order are rounded otherwise at each of the steps, not at the first alone.
    assert distance(run, expected) <= 10 * rounding < 1e-4


def make_mesh():
    return jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu"))


def spec_of(path, x, tensor, fsdp):
    """Heads and hidden features over "model", the first other axis that divides over "data"."""
    spec = [None] * x.ndim
    if tensor and re.search("(query|key|value|up|head)/kernel", name_of(path)):
        spec[1] = "model"
    if tensor and re.search("(out|down)/kernel|up/bias", name_of(path)):
        spec[0] = "model"
    if fsdp and x.ndim > 1:
        free = [i for i, n in enumerate(x.shape) if spec[i] is None and n % 4 == 0]
        spec[free[0]] = "data"
    return P(*spec)


def specs_for(tree, tensor=False, fsdp=False):
    return jax.tree_util.tree_map_with_path(lambda path, x: spec_of(path, x, tensor, fsdp), tree)


def shardings_for(tree, **layout):
    mesh = make_mesh()
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_for(tree, **layout))


STATE = jax.eval_shape(OPTIMIZER.init, PARAMS)


@pytest.mark.parametrize("tensor", [False, True], ids=["", "tensor"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["data", "fsdp"])
def test_training_under_jit_follows_the_single_device(fsdp, tensor, single):
    params, state = (shardings_for(x, fsdp=fsdp, tensor=tensor) for x in (PARAMS, STATE))
    step = jax.jit(functools.partial(take_step, GRADIENT), out_shardings=(params, state, None))
    batches = jax.device_put(BATCHES, NamedSharding(make_mesh(), P(None, "data")))
    check_follows(train(step, jax.device_put(first_params(), params), batches), single)


def train_in_shard_map(gradient, fsdp=False, check_vma=True):
    params, state = (specs_for(x, fsdp=fsdp) for x in (PARAMS, STATE))
    step = jax.shard_map(
        functools.partial(take_step, gradient),
        mesh=make_mesh(),
        in_specs=(params, state, P(AXES)),
        out_specs=(params, state, P()),
        check_vma=check_vma,
    )
    start = jax.device_put(first_params(), shardings_for(PARAMS, fsdp=fsdp))
    return train(jax.jit(step), start, BATCHES)


def test_data_parallel_training_averaged_by_autodiff_follows_the_single_device(single):
    def gradient(params, tokens):
        return jax.value_and_grad(lambda p: lax.pmean(loss_of(p, tokens), AXES))(params)

    check_follows(train_in_shard_map(gradient), single)


def test_data_parallel_training_averaged_by_pmean_follows_the_single_device(single):
    def gradient(params, tokens):
        return lax.pmean(GRADIENT(params, tokens), AXES)

    check_follows(train_in_shard_map(gradient, check_vma=False), single)


def test_fsdp_in_shard_map_follows_the_single_device(single):
    def gather(x, spec):
        if "data" not in spec:
            return x
        return lax.all_gather(x, "data", axis=tuple(spec).index("data"), tiled=True)

    def gradient(params, tokens):
        def loss(params):
            gathered = jax.tree.map(gather, params, specs_for(PARAMS, fsdp=True))
            return lax.pmean(loss_of(gathered, tokens), AXES)

        return jax.value_and_grad(loss)(params)

    check_follows(train_in_shard_map(gradient, fsdp=True), single)
