"""Replies in conversations between people who chat with strangers."""

import functools
import itertools
import json

from benchmarks import data
from benchmarks.tasks import Task
from benchmarks.tasks.shared.completion import Pair, Pairs, make_task

SHA256 = "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
LONGEST = 60


def splits() -> dict[str, list[Pair]]:
    """Turns of at most 60 characters and the replies to them, divided by conversation."""
    with data.archive("chitchat-dataset", "0.9.0", SHA256) as wheel:
        conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    turns = [
        (name, place, pair)
        for name, conversation in conversations.items()
        for place, pair in enumerate(_read(conversation["messages"]))
    ]
    divided = data.divide(turns, unit=lambda turn: turn[0])
    return {split: [pair for *_, pair in part] for split, part in divided.items()}


def _read(turns: list[list[dict[str, str]]]) -> list[Pair]:
    """Each turn, which can be several messages, with the next."""
    texts = [" ".join(" ".join(message["text"] for message in turn).split()) for turn in turns]
    short = [text if 0 < len(text) <= LONGEST else "" for text in texts]
    return [pair for pair in itertools.pairwise(short) if all(pair)]


@functools.cache
def load() -> Task:
    """Reads the conversations."""
    # The target is what AdamW reached in a pilot of half the steps.
    metric = "perplexity of a reply's tokens"
    return make_task(
        Pairs(splits(), prompt=20, completion=20),
        metric=metric,
        higher_is_better=False,
        target=340.0,
        shown=6,
    )
