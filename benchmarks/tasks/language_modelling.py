"""Byte-level language modelling on the reference manual that ships inside CPython."""

import functools
import math
import pydoc_data.topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import data
from benchmarks.models.gpt import GPT, GPTConfig
from benchmarks.tasks import Task, printable

CONFIG = GPTConfig(vocabulary=256, context=64, depth=2, heads=4, width=128)
# Where an accelerator is at hand.
LARGE = GPTConfig(vocabulary=256, context=256, depth=8, heads=8, width=512)
EVALUATED = 128
SAMPLE_LENGTH = 240


@functools.cache
def splits() -> dict[str, np.ndarray]:
    """The text's bytes: the first nine tenths to train, the rest to validate and to test."""
    topics = [topic.strip() for _, topic in sorted(pydoc_data.topics.topics.items())]
    # Topics contain each other, and what was seen in training is no test.
    paragraphs = dict.fromkeys("\n\n".join(topics).split("\n\n"))
    whole = np.frombuffer("\n\n".join(paragraphs).encode(), np.uint8)
    train, validation, test = np.split(whole, [len(whole) * 18 // 20, len(whole) * 19 // 20])
    return {"train": train, "validation": validation, "test": test}


def load() -> Task:
    """Reads the text."""
    return Task(
        metric="bits per character",
        higher_is_better=False,
        target=3.0,
        fingerprint=data.fingerprint(splits().values()),
        steps=1200,
        batch_size=8,
        **_sized(CONFIG),
        loss=_loss,
        evaluate=_evaluate,
        sample=_sample,
        large=_sized(LARGE),
    )


def _sized(config: GPTConfig) -> dict[str, Any]:
    """What depends on the model."""
    return {
        "model": lambda seed: GPT(config, nnx.Rngs(seed)),
        "batch": functools.partial(_batch, config.context),
    }


def _windows(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    """One token longer than the context."""
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def _batch(context: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Random windows of the training text."""
    text = splits()["train"]
    rng = np.random.default_rng((seed, step))
    return _windows(text, rng.integers(len(text) - context, size=batch_size), context)


def _loss(model: GPT, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next byte, in nats."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


_evaluation_loss = nnx.jit(_loss)


def _evaluate(model: GPT, split: str) -> float:
    """Bits per character over evenly spread windows of a split's text.

    A character that UTF-8 writes in several bytes counts once.
    """
    text, context = splits()[split], model.config.context
    starts = np.linspace(0, len(text) - context - 1, EVALUATED).astype(int)
    windows = _windows(text, starts, context)
    targets = windows[:, 1:]
    characters = np.count_nonzero(targets & 0xC0 != 0x80)
    bits_per_byte = float(_evaluation_loss(model, jnp.asarray(windows))) / math.log(2)
    return bits_per_byte * targets.size / characters


@functools.partial(nnx.jit, static_argnames="length")
def _generate(model: GPT, prompt: jax.Array, key: jax.Array, length: int) -> jax.Array:
    """Continues `prompt`, which fills the context, by `length` tokens at temperature 0.7."""

    def step(window, key):
        token = jax.random.categorical(key, model(window[None])[0, -1] / 0.7)
        return jnp.append(window[1:], token.astype(window.dtype)), token

    return jax.lax.scan(step, prompt, jax.random.split(key, length))[1]


def _sample(model: GPT, seed: int) -> str:
    """A continuation of the first paragraph of the test text that is prose."""
    text = splits()["test"]
    start = text.tobytes().index(b"\n\nThe ") + 2
    prompt = text[start : start + model.config.context].astype(np.int32)
    tokens = _generate(model, jnp.asarray(prompt), jax.random.key(seed), SAMPLE_LENGTH)
    texts = (bytes(np.asarray(x, np.uint8)).decode(errors="replace") for x in (prompt, tokens))
    return printable("▸".join(texts))
