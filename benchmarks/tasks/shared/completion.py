"""What tasks share in which a GPT reads a prompt and writes its completion, such as a reply."""

import importlib.metadata
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from benchmarks import data
from benchmarks.models.gpt import GPT, GPTConfig, complete
from benchmarks.tasks import Rows, Task, printable

__all__ = [
    "PAD",
    "Examples",
    "Pair",
    "Pairs",
    "evaluation_loss",
    "learn_tokenizer",
    "loss",
    "make_task",
]

Pair = tuple[str, str]
PAD, SEPARATOR, END = range(3)
VOCABULARY = 2000
PROMPT_CHARACTERS = 200
SPECIAL = ["<pad>", "<separator>", "<end>"]


def learn_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte pairs that are frequent in some texts; where it was learnt before, it is read."""

    def learn() -> bytes:
        # With a space before it, a first word is the token that it is elsewhere.
        learner = ByteLevelBPETokenizer(add_prefix_space=True)
        learner.train_from_iterator(
            texts, vocabulary, min_frequency=2, special_tokens=SPECIAL, show_progress=False
        )
        return learner.to_str().encode()

    version = importlib.metadata.version("tokenizers")
    key = "\n".join([pathlib.Path(__file__).read_text(), version, str(vocabulary), *texts])
    return Tokenizer.from_str(data.cached("tokenizer.json", key, learn).decode())


class Examples(NamedTuple):
    """Rows of prompt, separator, completion, end, and padding.

    Attributes:
      tokens: ids of shape (row, context).
      given: how many of each row the prompt and its separator take, shape (row,).
    """

    tokens: Any
    given: Any


class Pairs:
    """Pairs of prompt and completion as tokens.

    Attributes:
      splits: the pairs of each split, as text.
      vocabulary: how many different tokens.
      evaluated: how many of each split `first` takes.
      examples: the pairs of each split, as tokens.
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Pair]],
        *,
        vocabulary: int = VOCABULARY,
        prompt: int,
        completion: int,
        evaluated: int,
    ):
        """Learns a tokenizer on the training pairs, and encodes all.

        Args:
          splits: the pairs of "train", "validation" and "test".
          vocabulary: how many different tokens.
          prompt: the most tokens of a prompt; what is longer loses its end.
          completion: the most tokens of a completion; what is longer loses its end.
          evaluated: how many pairs of a split to compute a metric on.
        """
        self.splits = splits
        self.vocabulary = vocabulary
        self.evaluated = evaluated
        self._lengths = prompt, completion
        texts = [text for pair in splits["train"] for text in pair]
        self._tokenizer = learn_tokenizer(texts, vocabulary)
        self.examples = {name: self.encode(pairs) for name, pairs in splits.items()}

    def encode(self, pairs: Iterable[Pair]) -> Examples:
        """The pairs as rows of one length."""
        prompt, completion = self._lengths
        prompts, completions = zip(*pairs, strict=True)
        encoded = zip(
            self._tokenizer.encode_batch(list(prompts)),
            self._tokenizer.encode_batch(list(completions)),
            strict=True,
        )
        tokens = np.full((len(prompts), prompt + completion + 2), PAD, np.int32)
        given = np.empty(len(prompts), np.int32)
        for row, (first, second) in enumerate(encoded):
            start = [*first.ids[:prompt], SEPARATOR]
            whole = [*start, *second.ids[:completion], END]
            tokens[row, : len(whole)] = whole
            given[row] = len(start)
        return Examples(tokens, given)

    @property
    def context(self) -> int:
        """Tokens in a row."""
        return sum(self._lengths) + 2

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all examples."""
        return data.fingerprint(array for part in self.examples.values() for array in part)

    def batch(self, seed: int, step: int, batch_size: int, rows: Rows) -> Examples:
        """Random training examples."""
        tokens, given = self.examples["train"]
        rng = np.random.default_rng((seed, step))
        chosen = rng.integers(len(tokens), size=batch_size)[rows]
        return Examples(tokens[chosen], given[chosen])

    def first(self, split: str) -> Examples:
        """The examples of a split that stand for it in evaluation."""
        tokens, given = self.examples[split]
        return Examples(jnp.asarray(tokens[: self.evaluated]), jnp.asarray(given[: self.evaluated]))

    def complete(self, model: GPT, split: str) -> tuple[list[str], list[str]]:
        """What a model makes of the `first` prompts of a split, greedily, and what was wanted."""
        examples = self.first(split)
        found = np.asarray(complete(model, *examples))
        texts = [
            self._tokenizer.decode(_until_end(row[start:])).strip()
            for row, start in zip(found, np.asarray(examples.given), strict=True)
        ]
        return texts, [completion for _, completion in self.splits[split][: self.evaluated]]

    def show(self, completions: Sequence[str], count: int, seed: int) -> str:
        """Prompts of the test split, what `complete` made of them, and what was wanted."""
        start = seed % (len(completions) // count) * count
        chosen = slice(start, start + count)
        blocks = (
            f"{shorten(prompt, PROMPT_CHARACTERS)}\n▸ {completion}\n= {wanted}"
            for (prompt, wanted), completion in zip(
                self.splits["test"][chosen], completions[chosen], strict=True
            )
        )
        return printable("\n\n".join(blocks))


def loss(model: GPT, examples: Examples) -> jax.Array:
    """Mean cross-entropy of the tokens of the completions and their ends, in nats."""
    logits, targets = model(examples.tokens[:, :-1]), examples.tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    positions = jnp.arange(1, examples.tokens.shape[1])[None]
    counted = (positions >= examples.given[:, None]) & (targets != PAD)
    return jnp.where(counted, losses, 0).sum() / counted.sum(dtype=losses.dtype)


evaluation_loss = nnx.jit(loss)


def make_task(pairs: Pairs, **fields: Any) -> Task:
    """The task of completing `pairs`, with a small GPT; `fields` are what tasks do not share."""
    config = GPTConfig(pairs.vocabulary, pairs.context, depth=2, heads=4, width=128)
    return Task(
        fingerprint=pairs.fingerprint,
        steps=600,
        sweep=600,
        batch_size=16,
        tokens=pairs.context,
        unit="tokens",
        model=lambda seed: GPT(config, nnx.Rngs(seed)),
        batch=pairs.batch,
        loss=loss,
        **fields,
    )


def _until_end(row: np.ndarray) -> list[int]:
    ends = np.flatnonzero(row == END)
    return row[: ends[0] if ends.size else None].tolist()
