"""What a task provides, and the tasks by name. A new task is one new file in this folder."""

import ast
import dataclasses
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

SPLITS = ("train", "validation", "test")

# Results of `compare`.
TUNED = pathlib.Path(__file__).parents[1] / "results/cpu-2-cores/compare/compare.json"

# Each module here has a function `load` that returns its Task.
TASKS = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg))


@dataclasses.dataclass(frozen=True)
class Task:
    """Data, model, loss and metric of one application.

    A batch is a pure function of `(seed, step, batch_size)`; its leaves' first axis is the example.
    The metric is of a split of `SPLITS`, where "train" stands for a fixed part of it, about as
    large as the validation split.
    """

    metric: str  # The name of what `evaluate` returns, with its unit.
    higher_is_better: bool
    target: float  # The value of the metric that counts as reached, fixed before any run.
    fingerprint: str  # The SHA-256 of the data, hexadecimal.
    steps: int  # Of training, unless the user says otherwise, as the batch size.
    batch_size: int
    model: Callable[[int], nnx.Module]  # From a seed.
    batch: Callable[..., Any]
    loss: Callable[[Any, Any], jax.Array]  # Of a model on a batch.
    evaluate: Callable[[Any, str], float]
    sample: Callable[[Any, int], str]  # What a model makes of unseen inputs, from a seed.
    evaluations: int = 20  # How often a run computes the metric on its way, at the end too.
    # Peak rates of contenders where `tuned` has none.
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # The fields that are others where an accelerator is at hand, such as a larger model's.
    large: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def measure(self) -> str:
        """The metric, and which way is better."""
        return f"{self.metric}, {'higher' if self.higher_is_better else 'lower'} is better"

    def better(self, value: float, other: float) -> bool:
        """Whether one value of the metric is at least as good as another; no NaN is."""
        return value >= other if self.higher_is_better else value <= other


def draw(examples: Any, seed: int, step: int, batch_size: int) -> Any:
    """A batch of random examples, along the first axis of all leaves."""
    count = len(jax.tree.leaves(examples)[0])
    chosen = np.random.default_rng((seed, step)).integers(count, size=batch_size)
    return jax.tree.map(lambda x: x[chosen], examples)


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


def enlarged(task: Task) -> Task:
    """A task for an accelerator: ten times the steps, four times the batch, and what is `large`."""
    more = {"steps": 10 * task.steps, "batch_size": 4 * task.batch_size, **task.large}
    return dataclasses.replace(task, **more)


def tuned(name: str) -> dict[str, float]:
    """A task's best peak rate of each optimizer, among half-decades, that `compare` found."""
    places = json.loads(TUNED.read_text()).get(name, {"standings": []})["standings"]
    return {place["optimizer"]: float(f"{place['learning_rate']:.1g}") for place in places}
