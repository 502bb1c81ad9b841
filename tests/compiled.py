"""Updates of a GPT's gradients, each compiled once for a TPU or GPU that need not be there."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.lowering.programs import Collective, collectives
from benchmarks.lowering.topologies import Topology, make_mesh
from benchmarks.lowering.updates import CONFIG, METHODS, compile_update, gradients
from benchmarks.models.gpt import GPTConfig

OURS = ["unit_scale()", 'unit_scale(scope="global")']


class Program(NamedTuple):
    """A compiled update: its text and memory, what it was made for, and what it sends."""

    text: str
    memory: Any
    leaves: list[Any]
    devices: int
    collectives: list[Collective]


@functools.cache
def compiled(
    topology: Topology, method: Any, config: GPTConfig = CONFIG, dtype: Any = jnp.float32
) -> Program:
    mesh = make_mesh(topology)
    updates = jax.tree.map(lambda x: x.update(dtype=dtype), gradients(config, mesh))
    transformation = METHODS[method] if isinstance(method, str) else method
    program = compile_update(transformation, updates)
    text = program.as_text()
    assert text
    found = collectives(text, mesh.size)
    return Program(text, program.memory_analysis(), jax.tree.leaves(updates), mesh.size, found)
