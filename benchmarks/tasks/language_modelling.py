"""Byte-level language modelling on the reference manual that ships inside CPython."""

import functools
import math
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import data
from benchmarks.models.gpt import GPT, GPTConfig
from benchmarks.tasks import Rows, Task, draw_rows, printable

CONFIG = GPTConfig(vocabulary=256, context=64, depth=2, heads=4, width=128)
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
        tokens=CONFIG.context,
        unit="tokens",
        model=lambda seed: GPT(CONFIG, nnx.Rngs(seed)),
        batch=_batch,
        loss=_loss,
        evaluate=_evaluate,
        sample=_sample,
    )


def _windows(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """One token longer than the context."""
    return text[starts[:, None] + np.arange(CONFIG.context + 1)].astype(np.int32)


def _batch(seed: int, step: int, batch_size: int, rows: Rows) -> np.ndarray:
    """Random windows of the training text."""
    text = splits()["train"]
    return _windows(text, draw_rows(seed, step, len(text) - CONFIG.context, batch_size, rows))


def _loss(model: GPT, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next byte, in nats."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


_evaluation_loss = nnx.jit(_loss)


def _evaluate(model: GPT, split: str) -> float:
    """Bits per character over evenly spread windows of a split's text.

    A character that UTF-8 writes in several bytes counts once.
    """
    text = splits()[split]
    starts = np.linspace(0, len(text) - CONFIG.context - 1, EVALUATED).astype(int)
    windows = _windows(text, starts)
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
    prompt = text[start : start + CONFIG.context].astype(np.int32)
    tokens = _generate(model, jnp.asarray(prompt), jax.random.key(seed), SAMPLE_LENGTH)
    texts = (bytes(np.asarray(x, np.uint8)).decode(errors="replace") for x in (prompt, tokens))
    return printable("▸".join(texts))
