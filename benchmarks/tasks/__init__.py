"""What a task provides, and the tasks by name. A new task is one new file in this folder."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

__all__ = ["TASKS", "Rows", "Task", "load"]

Batch = Any
Rows = slice | np.ndarray

# Each module here has a function `load` that returns its Task.
TASKS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@dataclasses.dataclass(frozen=True)
class Task:
    """Data, model, loss and metric of one application.

    Attributes:
      metric: the name of what `evaluate` returns, with its unit; lower is better.
      target: the value of the metric that counts as reached, fixed before any run.
      fingerprint: the SHA-256 of the data, hexadecimal.
      batch_size: examples in a batch unless the user says otherwise.
      tokens: how many tokens one example holds, for the throughput.
      model: makes the model from a seed.
      batch: those rows of a training batch that `(seed, step, batch_size, rows)` names by a slice
        or by indices, a pure function; its leaves' first axis is the row.
      loss: the scalar training loss of a model on a batch.
      evaluate: the metric of a model on the validation split.
      sample: what the model makes of an unseen input, as text, from a seed.
    """

    metric: str
    target: float
    fingerprint: str
    batch_size: int
    tokens: int
    model: Callable[[int], nnx.Module]
    batch: Callable[..., Batch]
    loss: Callable[[Any, Batch], jax.Array]
    evaluate: Callable[[Any], float]
    sample: Callable[[Any, int], str]


def load(name: str) -> Task:
    """Reads a task's data and returns it ready to train."""
    return importlib.import_module(f"benchmarks.tasks.{name}").load()
