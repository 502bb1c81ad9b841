"""What a task provides, and the tasks by name. A new task is one new file in this folder."""

import ast
import dataclasses
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

__all__ = ["SPLITS", "TASKS", "Rows", "Task", "load", "printable", "summary"]

SPLITS = ("train", "validation", "test")
Batch = Any
Rows = slice | np.ndarray

# Each module here has a function `load` that returns its Task.
TASKS = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg))


@dataclasses.dataclass(frozen=True)
class Task:
    """Data, model, loss and metric of one application.

    Attributes:
      metric: the name of what `evaluate` returns, with its unit.
      higher_is_better: whether a good model has a high metric, such as an accuracy.
      target: the value of the metric that counts as reached, fixed before any run.
      fingerprint: the SHA-256 of the data, hexadecimal.
      steps: training steps unless the user says otherwise.
      sweep: the same where there are many runs.
      batch_size: examples in a batch unless the user says otherwise.
      tokens: how many of `unit` one example holds, for the throughput.
      unit: what a model reads, in the plural: "tokens", "images".
      learning_rates: the peak rates of contenders unless the user says otherwise.
      model: makes the model from a seed.
      batch: those rows of a training batch that `(seed, step, batch_size, rows)` names by a slice
        or by indices, a pure function; its leaves' first axis is the row.
      loss: the scalar training loss of a model on a batch.
      evaluate: the metric of a model on a split: "validation", "test", or "train", which stands
        for a fixed part of the training data, about as large as the validation split.
      sample: what the model makes of unseen inputs, as text, from a seed.
      draw: the same as a picture, where people would rather look.
      evaluations: how often a run computes the metric on its way, at the end too.
    """

    metric: str
    higher_is_better: bool
    target: float
    fingerprint: str
    steps: int
    sweep: int
    batch_size: int
    tokens: int
    unit: str
    learning_rates: Mapping[str, float]
    model: Callable[[int], nnx.Module]
    batch: Callable[..., Batch]
    loss: Callable[[Any, Batch], jax.Array]
    evaluate: Callable[[Any, str], float]
    sample: Callable[[Any, int], str]
    draw: Callable[[Any, int], Figure] | None = None
    evaluations: int = 20

    def better(self, value: float, other: float) -> bool:
        """Whether one value of the metric is at least as good as another; no NaN is."""
        return value >= other if self.higher_is_better else value <= other


def printable(text: str) -> str:
    """The text without what a terminal would obey, which an untrained model may write."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def summary(name: str) -> str:
    """The first line of what a task's file says of it, without importing it."""
    text = (pathlib.Path(__path__[0]) / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def load(name: str) -> Task:
    """Reads a task's data and returns it ready to train."""
    return importlib.import_module(f"benchmarks.tasks.{name}").load()
