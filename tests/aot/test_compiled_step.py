"""A whole training step of a fully sharded GPT, with unit_scale and without."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.lowering.programs import Collective, collectives
from benchmarks.lowering.topologies import TOPOLOGIES, make_mesh
from benchmarks.models.gpt import GPT, GPTConfig
from optax_unitscale import unit_scale

pytest.importorskip("libtpu", reason="needs the extra aot")
pytest.importorskip("jax_cuda13_plugin", reason="needs the extra aot")

CONFIG = GPTConfig(vocabulary=1024, context=256, depth=1, heads=4, width=512)
GRAPH, PARAMS = nnx.split(nnx.eval_shape(lambda: GPT(CONFIG, nnx.Rngs(0))), nnx.Param)
# The kernels and embeddings; vectors are on every device.
SPLIT = sum(x.ndim > 1 for x in jax.tree.leaves(PARAMS))
VECTOR_BYTES = sum(4 * x.size for x in jax.tree.leaves(PARAMS) if x.ndim == 1)
FIRST = {
    "once": unit_scale(),
    "twice": optax.chain(unit_scale("linf"), unit_scale()),
    "nothing": optax.identity(),
}


def loss_of(params, tokens):
    logits = nnx.merge(GRAPH, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def place(tree, mesh):
    """Splits the first axis of what is no vector and divides evenly over all devices."""

    def with_sharding(x):
        spec = [None] * x.ndim
        if x.ndim > 1:
            spec[next(i for i, n in enumerate(x.shape) if n % mesh.size == 0)] = "fsdp"
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))

    return jax.tree.map(with_sharding, tree)


@functools.cache
def sent(platform: str, first: str) -> list[Collective]:
    """The collectives of a step."""
    mesh = Mesh(np.ravel(make_mesh(TOPOLOGIES[platform]).devices), "fsdp")
    optimizer = optax.chain(FIRST[first], optax.sgd(0.1, momentum=0.9))

    def step(params, state, tokens):
        loss, updates = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = optimizer.update(updates, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = place(PARAMS, mesh)
    state = place(jax.eval_shape(optimizer.init, PARAMS), mesh)
    tokens = jax.ShapeDtypeStruct(
        (mesh.size, CONFIG.context + 1), jnp.int32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    layouts = jax.tree.map(lambda x: x.sharding, (params, state))
    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*layouts, None))
    text = compiled.lower(params, state, tokens).compile().as_text()
    assert text
    return collectives(text, mesh.size)


def reductions(found: list[Collective]) -> list[Collective]:
    return [x for x in found if x.kind == "all-reduce"]


def others(found: list[Collective]) -> collections.Counter[str]:
    """The bytes that are put into all other kinds."""
    count: collections.Counter[str] = collections.Counter()
    for x in found:
        if x.kind != "all-reduce":
            count[x.kind] += x.input_bytes
    return count


# On GPU the sums travel in an all-reduce that is there without them.
@pytest.mark.parametrize(("platform", "more"), [("TPU v5e, 256 chips", 1), ("H100, 256 GPUs", 0)])
def test_unit_scale_adds_one_all_reduce_at_most_and_three_numbers_a_leaf(platform, more):
    ours, plain = sent(platform, "once"), sent(platform, "nothing")
    assert len(reductions(ours)) - len(reductions(plain)) == more
    assert others(ours) <= others(plain)
    # The vectors' gradients are summed over the devices, as is the loss; with them go the sums.
    together = min(reductions(ours), key=lambda x: x.input_bytes)
    assert together.input_bytes == VECTOR_BYTES + 4 + 3 * 4 * SPLIT
    assert {dtype for dtype, _ in together.inputs} == {"f32"}


@pytest.mark.parametrize(("platform", "more"), [("TPU v5e, 256 chips", 2), ("H100, 256 GPUs", 1)])
def test_a_norm_that_waits_for_another_is_seen_to_add_one(platform, more):
    twice, plain = sent(platform, "twice"), sent(platform, "nothing")
    assert len(reductions(twice)) - len(reductions(plain)) == more
