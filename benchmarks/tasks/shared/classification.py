"""What the tasks share in which a model chooses a label: all but the examples and the model."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

from benchmarks import data
from benchmarks.tasks import Task, draw

SHOWN = 32


class Examples(NamedTuple):
    """What a model takes, one array an argument, and the labels; the first axis is the example."""

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray


def make_task(
    splits: Mapping[str, Examples],
    show: Callable[[np.ndarray, int], str],
    evaluated: int | None = None,
    **fields: Any,
) -> Task:
    """A Task whose model maps inputs to logits, its metric the accuracy; `fields`: what differs.

    The accuracy is of the first `evaluated` of a split, or as many as there are to validate. `show`
    makes a text of the labels predicted for that part of the test split, and of a seed.
    """
    count = evaluated or len(splits["validation"].labels)
    firsts = {name: jax.tree.map(lambda x: x[:count], part) for name, part in splits.items()}

    def evaluate(model: nnx.Module, name: str) -> float:
        predicted = _predict(model, firsts[name].inputs)
        is_lost = (predicted < 0).any()
        return math.nan if is_lost else 100 * float(accuracy_score(firsts[name].labels, predicted))

    def sample(model: nnx.Module, seed: int) -> str:
        return show(np.asarray(_predict(model, firsts["test"].inputs)), seed)

    return Task(
        metric="accuracy [%]",
        higher_is_better=True,
        fingerprint=data.fingerprint(jax.tree.leaves(list(splits.values()))),
        batch=lambda *where: draw(splits["train"], *where),
        loss=_loss,
        evaluate=evaluate,
        sample=sample,
        **fields,
    )


def _loss(model: Callable[..., jax.Array], batch: Examples) -> jax.Array:
    """Mean cross-entropy of the label, in nats."""
    logits = model(*map(jnp.asarray, batch.inputs))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@nnx.jit
def _predict(model: Callable[..., jax.Array], inputs: tuple[jax.Array, ...]) -> jax.Array:
    """The likeliest label of each example; -1 where the logits are not finite."""
    logits = model(*map(jnp.asarray, inputs))
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)


def split_images(pixels: np.ndarray, labels: np.ndarray) -> dict[str, Examples]:
    """Eight tenths to train, one to validate and one to test, all with the same mix of labels.

    Pixels are from 0 to 1, (images, height, width).
    """
    indices = np.arange(len(labels))
    train, rest = train_test_split(indices, test_size=0.2, random_state=0, stratify=labels)
    validation, test = train_test_split(rest, test_size=0.5, random_state=0, stratify=labels[rest])
    parts = {"train": train, "validation": validation, "test": test}
    return {
        name: Examples((pixels[part].astype(np.float32),), labels[part].astype(np.int32))
        for name, part in parts.items()
    }


def make_image_task(splits: Mapping[str, Examples], **fields: Any) -> Task:
    """The task of labelling images; `fields` are what differs."""

    def show(predicted: np.ndarray, seed: int) -> str:
        """Labels over predictions of some test images, mistakes underlined."""
        chosen = np.random.default_rng(seed).choice(len(predicted), SHOWN, False)
        labels, predicted = splits["test"].labels[chosen], predicted[chosen]
        marks = ["^" if wrong else " " for wrong in labels != predicted]
        rows = {"test image": labels, "predicted": predicted, "wrong": marks}
        lines = (f"{name:<12}{' '.join(map(str, row))}".rstrip() for name, row in rows.items())
        return "\n".join(lines)

    return make_task(splits, show, **fields)
