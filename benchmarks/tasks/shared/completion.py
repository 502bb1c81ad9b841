"""What tasks share in which a GPT reads a prompt and writes its completion, such as a reply."""

from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import optax
import tokenizers
from flax import nnx
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from benchmarks import data
from benchmarks.models.gpt import GPT, GPTConfig, complete
from benchmarks.tasks import Task, draw, printable

Pair = tuple[str, str]
PAD, SEPARATOR, END = range(3)
SPECIAL = ["<pad>", "<separator>", "<end>"]


def learn_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte pairs that are frequent in some texts; where it was learnt before, it is read."""
    learn: Any = joblib.Memory(data.folder(), verbose=0).cache(_learn)
    return Tokenizer.from_str(learn(texts, vocabulary, tokenizers.__version__))


def _learn(texts: Sequence[str], vocabulary: int, version: str) -> str:
    del version
    # With a space before it, a first word is the token that it is elsewhere.
    learner = ByteLevelBPETokenizer(add_prefix_space=True)
    learner.train_from_iterator(
        texts, vocabulary, min_frequency=2, special_tokens=SPECIAL, show_progress=False
    )
    return learner.to_str()


class Examples(NamedTuple):
    """Rows of prompt, separator, completion, end, and padding.

    `tokens` are ids of shape (row, context); `given` is how many of each row the prompt and its
    separator take, shape (row,).
    """

    tokens: Any
    given: Any


class Pairs:
    """Pairs of prompt and completion: `splits` as text, `examples` as tokens.

    What is longer than so many tokens of a prompt or a completion loses its end. The first
    `evaluated` of a split stand for it in evaluation.
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Pair]],
        *,
        prompt: int,
        completion: int,
        vocabulary: int = 2000,
        evaluated: int = 128,
    ):
        self.splits, self.vocabulary, self.evaluated = splits, vocabulary, evaluated
        self.context = prompt + completion + 2
        self._prompt, self._completion = prompt, completion
        texts = [text for pair in splits["train"] for text in pair]
        self._tokenizer = learn_tokenizer(texts, vocabulary)
        self.examples = {name: self._encode(pairs) for name, pairs in splits.items()}

    def _encode(self, pairs: Sequence[Pair]) -> Examples:
        tokens = np.full((len(pairs), self.context), PAD, np.int32)
        given = np.empty(len(pairs), np.int32)
        sides = (self._tokenizer.encode_batch(list(x)) for x in zip(*pairs, strict=True))
        for row, (first, second) in enumerate(zip(*sides, strict=True)):
            start = [*first.ids[: self._prompt], SEPARATOR]
            whole = [*start, *second.ids[: self._completion], END]
            tokens[row, : len(whole)] = whole
            given[row] = len(start)
        return Examples(tokens, given)

    def first(self, split: str) -> Examples:
        """The examples of a split that stand for it in evaluation."""
        return jax.tree.map(lambda x: jnp.asarray(x[: self.evaluated]), self.examples[split])

    def complete(self, model: GPT, split: str) -> tuple[list[str], list[str]]:
        """What a model makes of the `first` prompts of a split, greedily, and what was wanted."""
        examples = self.first(split)
        rows = zip(np.asarray(complete(model, *examples)), examples.given, strict=True)
        texts = []
        for found in (row[int(start) :] for row, start in rows):
            ends = np.flatnonzero(found == END)
            found = found[: ends[0] if ends.size else None]
            texts.append(self._tokenizer.decode(found.tolist()).strip())
        return texts, [completion for _, completion in self.splits[split][: self.evaluated]]

    def show(self, completions: Sequence[str], count: int, seed: int) -> str:
        """Prompts of the test split, what `complete` made of them, and what was wanted."""
        start = seed % (len(completions) // count) * count
        chosen = slice(start, start + count)
        shown = zip(self.splits["test"][chosen], completions[chosen], strict=True)
        blocks = (f"{shorten(pair[0], 200)}\n▸ {found}\n= {pair[1]}" for pair, found in shown)
        return printable("\n\n".join(blocks))


def loss(model: GPT, examples: Examples) -> jax.Array:
    """Mean cross-entropy of the tokens of the completions and their ends, in nats."""
    logits, targets = model(examples.tokens[:, :-1]), examples.tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    positions = jnp.arange(1, examples.tokens.shape[1])[None]
    counted = (positions >= examples.given[:, None]) & (targets != PAD)
    return jnp.where(counted, losses, 0).sum() / counted.sum(dtype=losses.dtype)


evaluation_loss = nnx.jit(loss)


def make_task(
    pairs: Pairs,
    *,
    score: Callable[[Sequence[str], Sequence[str]], float] | None = None,
    shown: int = 4,
    **fields: Any,
) -> Task:
    """The task of completing `pairs`, with a small GPT; `fields` are what tasks do not share.

    The metric is the score of what was found against what was wanted, else the perplexity.
    """
    config = GPTConfig(pairs.vocabulary, pairs.context, depth=2, heads=4, width=128)

    def evaluate(model: GPT, split: str) -> float:
        if score is None:
            return float(jnp.exp(evaluation_loss(model, pairs.first(split))))
        return score(*pairs.complete(model, split))

    def sample(model: GPT, seed: int) -> str:
        return pairs.show(pairs.complete(model, "test")[0], shown, seed)

    return Task(
        fingerprint=data.fingerprint(jax.tree.leaves(list(pairs.examples.values()))),
        steps=600,
        batch_size=16,
        model=lambda seed: GPT(config, nnx.Rngs(seed)),
        batch=lambda *where: draw(pairs.examples["train"], *where),
        loss=loss,
        evaluate=evaluate,
        sample=sample,
        **fields,
    )
