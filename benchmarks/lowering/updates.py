"""The update of a sharded GPT's gradients, compiled for a topology, and what was made of it."""

import collections
import math
import re
import time
from typing import Any

import jax
import optax
import optax.contrib
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.lowering.programs import (
    all_product_flops,
    collectives,
    product_flops,
    reads,
    wire_bytes,
)
from benchmarks.lowering.topologies import TOPOLOGIES, make_mesh
from benchmarks.models.gpt import GPT, GPTConfig
from benchmarks.optimizers import matrices
from benchmarks.timing.methods import SCOPES
from optax_unitscale import layers_of, orthogonalize, unit_scale

# 3.8 billion parameters in 54 leaves.
CONFIG = GPTConfig(vocabulary=32768, context=4096, depth=4, heads=64, width=8192)


def _are_kernels(tree: Any) -> Any:
    return layers_of(tree).map(lambda layer: layer.kind == "kernel", tree)


METHODS: dict[str, optax.GradientTransformation] = {
    "x * rsqrt(sum(x * x))": SCOPES["leaf"]["x * rsqrt(sum(x * x))"],
    "unit_scale()": unit_scale(),
    "x * rsqrt(sum of all x * x)": SCOPES["global"]["x * rsqrt(sum of all x * x)"],
    'unit_scale(scope="global")': unit_scale(scope="global"),
    "optax.normalize_by_update_norm()": optax.normalize_by_update_norm(),
    "optax.clip_by_global_norm(1)": optax.clip_by_global_norm(1.0),
    "optax.adaptive_grad_clip(0.01)": optax.adaptive_grad_clip(0.01),
    "optax.contrib.muon(0.02)": optax.contrib.muon(0.02),
    "optax.contrib.scale_by_muon(beta=0)": optax.masked(
        optax.contrib.scale_by_muon(
            beta=0.0, weight_dimension_numbers=lambda tree: matrices(layers_of(tree))(tree)
        ),
        _are_kernels,
    ),
    "orthogonalize()": orthogonalize(),
}


def gradients(config: GPTConfig, mesh: Mesh) -> Any:
    """The shapes of a GPT's gradients, laid over the mesh as `shard` says."""
    shapes = nnx.eval_shape(lambda: nnx.state(GPT(config, nnx.Rngs(0)), nnx.Param))
    return shard(nnx.to_pure_dict(shapes), mesh)


def shard(tree: Any, mesh: Mesh) -> Any:
    """Lays arrays named as a GPT's parameters over the mesh.

    Matrices that make heads and hidden features are split as ("fsdp", "tensor"), those that end
    them and the embeddings as ("tensor", "fsdp"); vectors and numbers are on every device.
    """

    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = P()
        if x.ndim > 1 and re.search("out/|down/|tokens/|positions/", name):
            spec = P("tensor", *[None] * (x.ndim - 2), "fsdp")
        elif x.ndim > 1:
            spec = P("fsdp", "tensor")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def whole_update(transformation: optax.GradientTransformation, updates: Any) -> Any:
    """The jaxpr of the transformation where there is one device."""

    def update(updates: Any) -> Any:
        return transformation.update(updates, transformation.init(updates), updates)[0]

    alone = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), updates)
    return jax.make_jaxpr(update)(alone).jaxpr


def compile_update(
    transformation: optax.GradientTransformation, updates: Any
) -> jax.stages.Compiled:
    """The transformation alone, with the gradients and its state donated."""
    mesh = jax.tree.leaves(updates)[0].sharding.mesh
    state = shard(jax.eval_shape(transformation.init, updates), mesh)
    update = jax.jit(transformation.update, donate_argnums=(0, 1))
    with jax.set_mesh(mesh):
        return update.lower(updates, state, updates).compile()


def measure(topology: str, method: str) -> dict[str, Any]:
    """Compiles one of `METHODS` for one of `TOPOLOGIES`.

    Gives the number of collectives of each kind; the bytes that each device receives, and those
    of all devices over those of all kernels; what matrix products it computes, over an even share
    of them, or None if there are none; temporaries, donated buffers that are used again, and the
    gradient's own size, in bytes a device; how often the gradient is read; compile seconds.
    """
    mesh = make_mesh(TOPOLOGIES[topology])
    updates = gradients(CONFIG, mesh)
    leaves = jax.tree.leaves(updates)
    start = time.perf_counter()
    compiled = compile_update(METHODS[method], updates)
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise RuntimeError(f"the compiler for {topology} does not show its programs")
    found = collectives(text, mesh.size)
    received = sum(map(wire_bytes, found))
    kernels = zip(leaves, jax.tree.leaves(_are_kernels(updates)), strict=True)
    kernel_bytes = sum(x.dtype.itemsize * x.size for x, is_kernel in kernels if is_kernel)
    products = all_product_flops(whole_update(METHODS[method], updates))
    return {
        "leaves": len(leaves),
        "collectives": dict(collections.Counter(x.kind for x in found)),
        "wire_bytes": round(received),
        "wire_ratio": round(received * mesh.size / kernel_bytes, 3),
        "products": round(product_flops(text) * mesh.size / products, 3) if products else None,
        "temporary_bytes": memory.temp_size_in_bytes,
        "reused_bytes": memory.alias_size_in_bytes,
        "gradient_bytes": sum(
            x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves
        ),
        "reads": round(reads(text, len(leaves)), 3),
        "compile_seconds": round(seconds, 2),
    }
