"""Yes or no, learnt from nothing: BoolQ's questions, each with a passage, by a small model."""

import functools

import numpy as np
from flax import nnx

from benchmarks.models.reader import Reader
from benchmarks.tasks import Task
from benchmarks.tasks.shared.boolq import Examples, make_task, splits
from benchmarks.tasks.shared.completion import PAD, learn_tokenizer

__all__ = ["examples", "load"]

VOCABULARY = 4000
WIDTH = 64
QUESTION, PASSAGE = 20, 128


@functools.cache
def examples() -> dict[str, Examples]:
    """The splits as tokens of the questions and of the passages."""
    divided = splits()
    # A passage's beginning is all that the model reads.
    texts = [text for x in divided["train"] for text in (x.question, x.passage[: 5 * PASSAGE])]
    tokenizer = learn_tokenizer(texts, VOCABULARY)

    def encode(texts: list[str], length: int) -> np.ndarray:
        rows = np.full((len(texts), length), PAD, np.int32)
        for row, encoded in zip(rows, tokenizer.encode_batch(texts), strict=True):
            ids = encoded.ids[:length]
            row[: len(ids)] = ids
        return rows

    return {
        name: Examples(
            (
                encode([x.question for x in part], QUESTION),
                encode([x.passage[: 5 * PASSAGE] for x in part], PASSAGE),
            ),
            np.array([x.yes for x in part], np.int32),
        )
        for name, part in divided.items()
    }


def load() -> Task:
    """Reads the questions."""
    return make_task(
        examples(),
        model=lambda seed: Reader(VOCABULARY, WIDTH, nnx.Rngs(seed)),
        tokens=QUESTION + PASSAGE,
        # What AdamW reached in a pilot of half the steps; always yes has 64.4.
        target=65.5,
        steps=1200,
        sweep=1200,
        batch_size=32,
        # The best of seven half-decades each, see results/cpu-2-cores/compare.
        learning_rates={
            "sgd": 0.03,
            "clip": 0.03,
            "adamw": 0.001,
            "muon": 0.001,
            "unit_scale": 0.1,
        },
    )
