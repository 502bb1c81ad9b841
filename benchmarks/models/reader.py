"""A classifier of a question and a passage: each word of the one attends to those of the other."""

import jax
import jax.numpy as jnp
from flax import nnx


class Reader(nnx.Module):
    """Decomposable attention with convolutions for context: two logits, of no and of yes.

    Source: Parikh, Täckström, Das, Uszkoreit 2016, A Decomposable Attention Model for Natural
    Language Inference, https://arxiv.org/abs/1606.01933
    """

    def __init__(self, vocabulary: int, width: int, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.context = nnx.Conv(width, width, kernel_size=(3,), rngs=rngs)
        self.compare = nnx.Linear(4 * width, width, rngs=rngs)
        self.decide = nnx.Linear(2 * width, width, rngs=rngs)
        self.head = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, question: jax.Array, passage: jax.Array) -> jax.Array:
        """Maps token ids (batch, word) and (batch, word), where 0 pads, to logits (batch, 2)."""
        words, pieces = self._read(question), self._read(passage)
        scores = jnp.einsum("bqw,bpw->bqp", words, pieces) / words.shape[-1] ** 0.5
        weights = nnx.softmax(scores, where=(passage != 0)[:, None], axis=-1)
        found = jnp.einsum("bqp,bpw->bqw", weights, pieces)
        both = jnp.concatenate([words, found, words * found, jnp.abs(words - found)], axis=-1)
        there = (question != 0)[:, :, None]
        compared = jnp.where(there, nnx.gelu(self.compare(both)), 0)
        mean = compared.sum(axis=1) / there.sum(axis=1, dtype=compared.dtype)
        pooled = jnp.concatenate([mean, compared.max(axis=1)], axis=-1)
        return self.head(nnx.gelu(self.decide(pooled)))

    def _read(self, ids: jax.Array) -> jax.Array:
        embedded = self.tokens(ids)
        return embedded + nnx.gelu(self.context(embedded))
