"""A decoder-only transformer: pre-norm blocks, causal attention, learned positions."""

import dataclasses
from collections.abc import Iterable
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT, counted in tokens, positions, blocks, heads and features."""

    vocabulary: int
    context: int
    depth: int
    heads: int
    width: int


class Block(nnx.Module):
    """Attention and a feed-forward layer, each on its own residual branch."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        width = config.width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        # No biases: the softmax is blind to the key's, whose gradient is rounding noise.
        self.attention = nnx.MultiHeadAttention(
            config.heads, width, decode=False, use_bias=False, rngs=rngs
        )
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, *, decode: bool = False) -> jax.Array:
        """Maps activations of shape (batch, position, width) to the same shape.

        With `decode` they are those of one position, and the attention remembers the ones before.
        """
        mask = None if decode else nnx.make_causal_mask(x[:, :, 0])
        x = x + self.attention(self.attention_norm(x), mask=mask, decode=decode)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """Next-token logits for a batch of token sequences."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.config = config
        self.tokens = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.context, config.width, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(config, rngs) for _ in range(config.depth)))
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids of shape (batch, position) to logits (batch, position, vocabulary)."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        return self.head(self.norm(self.blocks(x)))

    def start(self, batch_size: int) -> None:
        """Prepares to `read` as many sequences."""
        for block in cast(Iterable[Block], self.blocks.layers):
            block.attention.init_cache((batch_size, self.config.context, self.config.width))

    def read(self, tokens: jax.Array, position: jax.Array) -> jax.Array:
        """Maps the ids of shape (batch,) at a position to logits (batch, vocabulary).

        The positions before must have been read, in order.
        """
        x = (self.tokens(tokens) + self.positions(position)[None])[:, None]
        for block in self.blocks.layers:
            x = block(x, decode=True)
        return self.head(self.norm(x))[:, 0]


@nnx.jit
def complete(model: GPT, tokens: jax.Array, given: jax.Array) -> jax.Array:
    """Goes on after the first `given`, one or more, of each row with the likeliest next one.

    From ids (batch, context) to such ids; the model's parameters are left as they are.
    """
    # A copy, so that the caller's model gets no cache.
    reader = nnx.clone(model)
    reader.start(tokens.shape[0])
    graph, parameters, cache = nnx.split(reader, nnx.Param, ...)

    def step(carry, position):
        cache, token = carry
        reader = nnx.merge(graph, parameters, cache)
        likeliest = reader.read(token, position).argmax(axis=-1).astype(tokens.dtype)
        following = tokens[:, position + 1]
        token = jnp.where(position + 1 < given, following, likeliest)
        return (nnx.state(reader, nnx.Not(nnx.Param)), token), token

    positions = jnp.arange(tokens.shape[1] - 1)
    rest = jax.lax.scan(step, (cache, tokens[:, 0]), positions)[1]
    return jnp.concatenate([tokens[:, :1], rest.T], axis=1)
