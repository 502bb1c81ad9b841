"""What the tasks that name what an image shows share: all but the images and the model."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

from benchmarks import data
from benchmarks.tasks import Rows, Task

__all__ = ["Images", "make_task", "split"]

SHOWN = 32
COLUMNS = 8


class Images(NamedTuple):
    """Labelled images: pixels from 0 to 1, (images, height, width), and labels, (images,)."""

    pixels: np.ndarray
    labels: np.ndarray


def split(pixels: np.ndarray, labels: np.ndarray) -> dict[str, Images]:
    """Eight tenths to train, one to validate and one to test, all with the same mix of labels."""
    indices = np.arange(len(labels))
    train, rest = train_test_split(indices, test_size=0.2, random_state=0, stratify=labels)
    validation, test = train_test_split(rest, test_size=0.5, random_state=0, stratify=labels[rest])
    parts = {"train": train, "validation": validation, "test": test}
    return {
        name: Images(pixels[part].astype(np.float32), labels[part].astype(np.int32))
        for name, part in parts.items()
    }


def make_task(splits: Mapping[str, Images], **fields: Any) -> Task:
    """A Task whose model maps images to logits, its metric the accuracy; `fields`: what differs."""

    def batch(seed: int, step: int, batch_size: int, rows: Rows) -> Images:
        """Random images of the training split."""
        pixels, labels = splits["train"]
        chosen = np.random.default_rng((seed, step)).integers(len(labels), size=batch_size)[rows]
        return Images(pixels[chosen], labels[chosen])

    def evaluate(model: nnx.Module, name: str) -> float:
        pixels, labels = (part[: len(splits["validation"].labels)] for part in splits[name])
        predicted = _predict(model, jnp.asarray(pixels))
        is_lost = (predicted < 0).any()
        return math.nan if is_lost else 100 * float(accuracy_score(labels, predicted))

    def shown(model: nnx.Module, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Some images of the test split, their labels, and what the model takes them for."""
        pixels, labels = splits["test"]
        chosen = np.random.default_rng(seed).choice(len(labels), SHOWN, replace=False)
        return (
            pixels[chosen],
            labels[chosen],
            np.asarray(_predict(model, jnp.asarray(pixels[chosen]))),
        )

    return Task(
        metric="accuracy [%]",
        higher_is_better=True,
        fingerprint=data.fingerprint(array for part in splits.values() for array in part),
        tokens=1,
        unit="images",
        batch=batch,
        loss=_loss,
        evaluate=evaluate,
        sample=lambda model, seed: _lines(*shown(model, seed)[1:]),
        draw=lambda model, seed: _grid(*shown(model, seed)),
        **fields,
    )


def _loss(model: Callable[[jax.Array], jax.Array], batch: Images) -> jax.Array:
    """Mean cross-entropy of the label, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(
        model(jnp.asarray(batch.pixels)), batch.labels
    ).mean()


@nnx.jit
def _predict(model: Callable[[jax.Array], jax.Array], pixels: jax.Array) -> jax.Array:
    """The likeliest label of each image; -1 where the logits are not finite."""
    logits = model(pixels)
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)


def _lines(labels: np.ndarray, predicted: np.ndarray) -> str:
    """Labels over predictions, mistakes underlined."""
    marks = ["^" if wrong else " " for wrong in labels != predicted]
    rows = {"test image": labels, "predicted": predicted, "wrong": marks}
    return "\n".join(f"{name:<12}{' '.join(map(str, row))}".rstrip() for name, row in rows.items())


def _grid(pixels: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> Figure:
    """Images with their predictions, mistakes in red with the label."""
    rows = len(labels) // COLUMNS
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(1.2 * COLUMNS, 1.5 * rows + 0.5), layout="constrained"
    )
    for panel, image, label, guess in zip(axes.flat, pixels, labels, predicted, strict=True):
        right = label == guess
        panel.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        panel.set_title(
            f"{guess}" if right else f"{guess}, is {label}", color="black" if right else "red"
        )
        panel.set(xticks=[], yticks=[])
    wrong = np.count_nonzero(labels != predicted)
    figure.suptitle(f"Test images and what they are taken for: {wrong} of {len(labels)} wrong")
    return figure
