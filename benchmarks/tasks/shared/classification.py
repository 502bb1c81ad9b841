"""What the tasks that name what an image shows share: all but the images and the model."""

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
from benchmarks.tasks import Rows, Task, draw_rows

SHOWN = 32


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
        chosen = draw_rows(seed, step, len(labels), batch_size, rows)
        return Images(pixels[chosen], labels[chosen])

    def evaluate(model: nnx.Module, name: str) -> float:
        pixels, labels = (part[: len(splits["validation"].labels)] for part in splits[name])
        predicted = _predict(model, jnp.asarray(pixels))
        is_lost = (predicted < 0).any()
        return math.nan if is_lost else 100 * float(accuracy_score(labels, predicted))

    def sample(model: nnx.Module, seed: int) -> str:
        """Labels over predictions of some images of the test split, mistakes underlined."""
        chosen = np.random.default_rng(seed).choice(len(splits["test"].labels), SHOWN, False)
        pixels, labels = (part[chosen] for part in splits["test"])
        predicted = np.asarray(_predict(model, jnp.asarray(pixels)))
        marks = ["^" if wrong else " " for wrong in labels != predicted]
        rows = {"test image": labels, "predicted": predicted, "wrong": marks}
        lines = (f"{name:<12}{' '.join(map(str, row))}".rstrip() for name, row in rows.items())
        return "\n".join(lines)

    return Task(
        metric="accuracy [%]",
        higher_is_better=True,
        fingerprint=data.fingerprint(array for part in splits.values() for array in part),
        tokens=1,
        unit="images",
        batch=batch,
        loss=_loss,
        evaluate=evaluate,
        sample=sample,
        **fields,
    )


def _loss(model: Callable[[jax.Array], jax.Array], batch: Images) -> jax.Array:
    """Mean cross-entropy of the label, in nats."""
    logits = model(jnp.asarray(batch.pixels))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@nnx.jit
def _predict(model: Callable[[jax.Array], jax.Array], pixels: jax.Array) -> jax.Array:
    """The likeliest label of each image; -1 where the logits are not finite."""
    logits = model(pixels)
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)
