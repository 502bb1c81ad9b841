"""Replies in conversations between people who chat with strangers."""

import functools
import itertools
import json

import jax.numpy as jnp

from benchmarks import data
from benchmarks.models.gpt import GPT
from benchmarks.tasks import Task
from benchmarks.tasks.shared.completion import Pair, Pairs, evaluation_loss, make_task

__all__ = ["load", "pairs", "splits"]

PACKAGE = (
    "chitchat-dataset",
    "0.9.0",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
)
LONGEST = 60
SHOWN = 6


def splits() -> dict[str, list[Pair]]:
    """Turns of at most 60 characters and the replies to them, divided by conversation."""
    with data.archive(*PACKAGE) as wheel:
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
def pairs() -> Pairs:
    """The turns as tokens."""
    return Pairs(splits(), prompt=20, completion=20, evaluated=128)


def load() -> Task:
    """Reads the conversations."""
    return make_task(
        pairs(),
        metric="perplexity of a reply's tokens",
        higher_is_better=False,
        # What AdamW reached in a pilot of half the steps.
        target=340.0,
        # The best of seven half-decades each, see results/cpu-2-cores/compare.
        learning_rates={"sgd": 0.3, "clip": 0.3, "adamw": 0.003, "muon": 0.01, "unit_scale": 0.03},
        evaluate=_evaluate,
        sample=_sample,
    )


def _evaluate(model: GPT, split: str) -> float:
    """The perplexity of the replies of a split's first pairs."""
    return float(jnp.exp(evaluation_loss(model, pairs().first(split))))


def _sample(model: GPT, seed: int) -> str:
    """Likeliest replies to turns of unseen conversations, and what people replied."""
    found, _ = pairs().complete(model, "test")
    return pairs().show(found, SHOWN, seed)
