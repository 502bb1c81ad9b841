"""An encoder-only transformer, BERT, and how it takes the weights of a Hugging Face checkpoint."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["Bert", "BertConfig", "Classifier", "Frozen", "mean", "restore"]

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
# The pooler was trained for another task, and the ids of the positions count them.
UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, counted in tokens, positions, kinds, blocks, heads and features."""

    vocabulary: int
    context: int
    kinds: int
    depth: int
    heads: int
    width: int
    hidden: int
    epsilon: float

    @classmethod
    def read(cls, text: str) -> "BertConfig":
        """Takes the sizes from a Hugging Face `config.json`.

        Raises:
          ValueError: it describes another kind of model.
        """
        said = json.loads(text)
        built = {
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
        }
        for field, value in built.items():
            if said.get(field) != value:
                raise ValueError(
                    f"BertConfig.read: {field} is {said.get(field)!r}, expected {value!r}. "
                    "Load a checkpoint of the original BERT's form."
                )
        return cls(
            vocabulary=said["vocab_size"],
            context=said["max_position_embeddings"],
            kinds=said["type_vocab_size"],
            depth=said["num_hidden_layers"],
            heads=said["num_attention_heads"],
            width=said["hidden_size"],
            hidden=said["intermediate_size"],
            epsilon=said["layer_norm_eps"],
        )


class Block(nnx.Module):
    """Attention and a feed-forward layer, each normalised after its residual is added."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        width = config.width
        linear = functools.partial(nnx.Linear, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, width, epsilon=config.epsilon, rngs=rngs)
        self.heads = config.heads
        self.query = linear(width, width)
        # No bias: the softmax is blind to it, so its gradient is rounding noise, and at unit norm
        # it would be long noise.
        self.key = linear(width, width, use_bias=False)
        self.value = linear(width, width)
        self.out = linear(width, width)
        self.attention_norm = norm()
        self.up = linear(width, config.hidden)
        self.down = linear(config.hidden, width)
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

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.config = config
        self.words = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.context, config.width, rngs=rngs)
        self.kinds = nnx.Embed(config.kinds, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])

    def __call__(self, tokens: jax.Array, kinds: jax.Array) -> jax.Array:
        """Maps ids of tokens, where 0 pads, and of their kinds to vectors.

        Args:
          tokens: shape (batch, position).
          kinds: 0 in the first text and 1 in the second, of the same shape.

        Returns:
          shape (batch, position, width).
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

    Attributes:
      bert: its last blocks are trained, the rest of it stays as it is.
      head: a linear layer.
    """

    def __init__(self, bert: Bert, trained: int, rngs: nnx.Rngs):
        """Takes a BERT, for its own, and how many of its blocks to train."""
        blocks = list(cast(Iterable[Block], bert.blocks))
        for module in (bert.words, bert.positions, bert.kinds, bert.norm, *blocks[:-trained]):
            _freeze(module)
        self.bert = bert
        self.head = nnx.Linear(bert.config.width, 2, rngs=rngs)

    def __call__(self, tokens: jax.Array, kinds: jax.Array) -> jax.Array:
        """Maps what `Bert` takes to logits (batch, 2)."""
        return self.head(mean(self.bert(tokens, kinds), tokens))


def mean(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean (batch, width) of the vectors (batch, position, width) of what does not pad."""
    there = (tokens != 0)[:, :, None].astype(x.dtype)
    return (x * there).sum(axis=1) / there.sum(axis=1)


def _freeze(module: nnx.Module) -> None:
    for _, part in nnx.iter_modules(module):
        for name, value in list(vars(part).items()):
            if isinstance(value, nnx.Param):
                setattr(part, name, Frozen(value[...]))


def restore(model: Bert, tensors: Mapping[str, np.ndarray]) -> None:
    """Gives a model the weights of a checkpoint.

    Args:
      model: of the checkpoint's sizes; its parameters are replaced, and need only have shapes.
      tensors: by the names that PyTorch's modules have in Hugging Face's transformers.

    Raises:
      ValueError: a tensor is missing, has another shape or dtype, or has no place in the model; the
        model is as it was.
    """
    left = set(tensors) - set(UNUSED)
    left -= {f"{_stem(('blocks', str(i), 'key'))}.bias" for i in range(model.config.depth)}
    restored = []
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, leaf = map(str, path)
        name = f"{_stem(module)}.{LEAVES[leaf]}"
        # PyTorch's matrices multiply from the left.
        shape = parameter.shape[::-1] if leaf == "kernel" else parameter.shape
        wanted = f"float32 of shape {shape}"
        if name not in tensors:
            raise ValueError(
                f"restore: the checkpoint has no tensor {name!r}, expected {wanted}. "
                "Read a whole checkpoint."
            )
        tensor = tensors[name]
        if (tensor.dtype, tensor.shape) != (np.float32, shape):
            raise ValueError(
                f"restore: tensor {name!r} is {tensor.dtype} of shape {tensor.shape}, expected "
                f"{wanted}. Make the model from the checkpoint's own config.json."
            )
        value = jnp.asarray(tensor.T if leaf == "kernel" else tensor)
        restored.append((path, parameter.replace(value)))
        left.discard(name)
    if left:
        raise ValueError(
            f"restore: tensor {min(left)!r} has no place in the model, nor have {len(left) - 1} "
            "others. Make the model from the checkpoint's own config.json."
        )
    nnx.update(model, nnx.from_flat_state(restored))


def _stem(module: Iterable[str]) -> str:
    """The checkpoint's name for the module at a path."""
    first, *rest = module
    if not rest:
        return STEM[first]
    index, part = rest
    return f"encoder.layer.{index}.{BLOCK[part]}"
