"""The gradients that are timed: of GPTs from 1 to 350 million parameters, and of many leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.models.gpt import GPT, GPTConfig

MODELS = {
    "1M": GPTConfig(vocabulary=256, context=256, depth=4, heads=4, width=144),
    "35M": GPTConfig(vocabulary=8192, context=512, depth=8, heads=8, width=512),
    "124M": GPTConfig(vocabulary=24576, context=1024, depth=12, heads=12, width=768),
    "350M": GPTConfig(vocabulary=24576, context=1024, depth=24, heads=16, width=1024),
}


def gpt(model: str, dtype: str) -> Any:
    """The shapes of a GPT's gradients, as nested dicts, with one dtype for every leaf."""
    shapes = nnx.eval_shape(lambda: nnx.state(GPT(MODELS[model], nnx.Rngs(0)), nnx.Param))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), nnx.to_pure_dict(shapes)
    )


def leaves(count: int, total: int = 4_000_000) -> list[jax.ShapeDtypeStruct]:
    """Float32 leaves of `total` elements together, give or take, in four shapes by turns."""
    size = total // count
    shapes = [(size // rows, rows)[: 1 if rows == 1 else 2] for rows in (1, 2, 4, 8)]
    return [jax.ShapeDtypeStruct(shapes[i % 4], jnp.dtype("float32")) for i in range(count)]


def fill(shapes: Any) -> Any:
    """Arrays of normally distributed numbers, the same ones in every leaf."""
    largest = max(x.size for x in jax.tree.leaves(shapes))
    # To draw hundreds of millions of numbers would take longer than to time them.
    numbers = np.random.default_rng(0).standard_normal(largest, dtype=np.float32)
    return jax.tree.map(
        lambda x: jnp.array(numbers[: x.size].reshape(x.shape), dtype=x.dtype), shapes
    )


def parameters(tree: Any) -> int:
    """How many elements a tree has."""
    return sum(x.size for x in jax.tree.leaves(tree))
