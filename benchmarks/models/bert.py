"""An encoder-only transformer, BERT, and how it takes the weights of a Hugging Face checkpoint."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# What the modules are called in a checkpoint.
STEM = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "kinds": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}
# The sizes of a BERT, as a checkpoint's `config.json` calls them.
Config = Mapping[str, Any]


class Block(nnx.Module):
    """Attention and a feed-forward layer, each normalised after its residual is added."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, hidden = config["hidden_size"], config["intermediate_size"]
        linear = functools.partial(nnx.Linear, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, width, epsilon=config["layer_norm_eps"], rngs=rngs)
        self.heads = config["num_attention_heads"]
        self.query = linear(width, width)
        # No bias: the softmax is blind to it, so its gradient is rounding noise, and at unit norm
        # it would be long noise.
        self.key = linear(width, width, use_bias=False)
        self.value = linear(width, width)
        self.out = linear(width, width)
        self.attention_norm = norm()
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)
        self.mlp_norm = norm()

    def __call__(self, x: jax.Array, there: jax.Array) -> jax.Array:
        """Maps activations (batch, position, width) to the same shape; attends to what is there."""
        heads = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        query, key, value = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
        found = nnx.dot_product_attention(query, key, value, mask=there[:, None, None, :])
        x = self.attention_norm(x + self.out(found.reshape(x.shape)))
        return self.mlp_norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    """A vector for each token that depends on all tokens.

    Source: Devlin, Chang, Lee, Toutanova 2019, BERT: Pre-training of Deep Bidirectional
    Transformers for Language Understanding, https://arxiv.org/abs/1810.04805
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, features=config["hidden_size"], rngs=rngs)
        self.config = config
        self.words = embed(config["vocab_size"])
        self.positions = embed(config["max_position_embeddings"])
        self.kinds = embed(config["type_vocab_size"])
        width, epsilon = config["hidden_size"], config["layer_norm_eps"]
        self.norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config["num_hidden_layers"])])

    def __call__(self, tokens: jax.Array, kinds: jax.Array) -> jax.Array:
        """Maps ids (batch, position) of tokens, where 0 pads, to vectors (batch, position, width).

        The kinds are 0 in the first text and 1 in the second.
        """
        places = self.positions(jnp.arange(tokens.shape[1]))[None]
        x = self.norm(self.words(tokens) + places + self.kinds(kinds))
        for block in cast(Iterable[Block], self.blocks):
            x = block(x, tokens != 0)
        return x


class Frozen(nnx.Variable):
    """A weight that stays as it is, for it is no `nnx.Param`."""


class Classifier(nnx.Module):
    """Two logits, of no and of yes, of the mean of a BERT's vectors.

    Of the BERT the last `trained` blocks are trained, and the rest stays as it is.
    """

    def __init__(self, bert: Bert, trained: int, rngs: nnx.Rngs):
        blocks = list(cast(Iterable[Block], bert.blocks))
        for module in (bert.words, bert.positions, bert.kinds, bert.norm, *blocks[:-trained]):
            for _, part in nnx.iter_modules(module):
                for name, value in list(vars(part).items()):
                    if isinstance(value, nnx.Param):
                        setattr(part, name, Frozen(value[...]))
        self.bert = bert
        self.head = nnx.Linear(bert.config["hidden_size"], 2, rngs=rngs)

    def __call__(self, tokens: jax.Array, kinds: jax.Array) -> jax.Array:
        """Maps what `Bert` takes to logits (batch, 2)."""
        return self.head(mean(self.bert(tokens, kinds), tokens))


def mean(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean (batch, width) of the vectors (batch, position, width) of what does not pad."""
    there = (tokens != 0)[:, :, None].astype(x.dtype)
    return (x * there).sum(axis=1) / there.sum(axis=1)


def restore(model: Bert, tensors: Mapping[str, np.ndarray]) -> None:
    """Gives a model the weights of a checkpoint, by Hugging Face's names of PyTorch's modules.

    Its parameters are replaced, and need only have shapes.
    """
    restored = []
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, leaf = map(str, path)
        tensor = tensors[f"{_stem(module)}.{LEAVES[leaf]}"]
        # PyTorch's matrices multiply from the left.
        value = jnp.asarray(tensor.T if leaf == "kernel" else tensor)
        restored.append((path, parameter.replace(value)))
    nnx.update(model, nnx.from_flat_state(restored))


def _stem(module: Iterable[str]) -> str:
    """The checkpoint's name for the module at a path."""
    first, *rest = module
    if not rest:
        return STEM[first]
    index, part = rest
    return f"encoder.layer.{index}.{BLOCK[part]}"
