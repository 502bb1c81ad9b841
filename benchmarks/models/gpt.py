"""A decoder-only transformer: pre-norm blocks, causal attention, learned positions."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["GPT", "GPTConfig"]


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

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps activations of shape (batch, position, width) to the same shape."""
        mask = nnx.make_causal_mask(x[:, :, 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
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
