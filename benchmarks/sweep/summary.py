"""What a sweep says of each optimizer on a task."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.optimizers import CONTENDERS
from benchmarks.sweep.compare_search import best_rate, worth
from benchmarks.sweep.trial import Trial
from benchmarks.tasks import SPLITS, Task

__all__ = ["NEAR", "Standing", "standings"]

# Of the best: a metric within this share of it counts as near.
NEAR = 0.1


class Standing(NamedTuple):
    """How one optimizer did on one task.

    Attributes:
      optimizer: its name.
      learning_rate: the best of those tried, by the final validation metric with seed 0.
      at_edge: whether it was the least or the greatest of those tried.
      test: the final test metric at that rate: of each further seed; None for NaN.
      mean: of these.
      gap: the training metric minus the test metric, mean over the seeds.
      steps: median steps to the target over the seeds, None if half of them or more never came to.
      seconds: the same in seconds of training; on CPU, of all cores' time together.
      near: how many decades of learning rate came within `NEAR` of the best of any optimizer.
      near_own: the same of its own best.
      diverged: how many of the learning rates tried diverged.
      tried: how many learning rates were tried.
    """

    optimizer: str
    learning_rate: float
    at_edge: bool
    test: list[float | None]
    mean: float | None
    gap: float | None
    steps: int | None
    seconds: float | None
    near: float
    near_own: float
    diverged: int
    tried: int


def standings(trials: Sequence[Trial], task: Task) -> list[Standing]:
    """One standing an optimizer that has a finished trial, the best test metric first.

    Args:
      trials: all of one task.
      task: the task.

    Returns:
      The standings.
    """
    tuning = {
        name: [trial for trial in trials if trial.optimizer == name and trial.seed == 0]
        for name in CONTENDERS
    }
    best = max((worth(t, task) for own in tuning.values() for t in own), default=-math.inf)
    result = [
        _standing(name, own, [t for t in trials if t.optimizer == name and t.seed], task, best)
        for name, own in tuning.items()
        if own
    ]
    sign = -1 if task.higher_is_better else 1
    return sorted(result, key=lambda x: math.inf if x.mean is None else sign * x.mean)


def _standing(
    name: str, tuning: Sequence[Trial], seeds: Sequence[Trial], task: Task, best: float
) -> Standing:
    rate = best_rate(list(tuning), task)
    rates = sorted(trial.learning_rate for trial in tuning)
    everything, seeds = [*tuning, *seeds], [t for t in seeds if t.learning_rate == rate]
    values = {split: [trial.results[split] for trial in seeds] for split in SPLITS}
    gaps = [
        train - test
        for train, test in zip(values["train"], values["test"], strict=True)
        if train is not None and test is not None
    ]
    reached = sorted(math.inf if x.reached is None else x.reached for x in seeds)
    steps = statistics.median_high(reached) if reached else math.inf
    # Of all trials, for the machine may have been busy during one.
    paces = [trial.seconds for trial in everything if trial.seconds is not None]
    own = max(worth(trial, task) for trial in tuning)
    return Standing(
        optimizer=name,
        learning_rate=rate,
        at_edge=rate in (rates[0], rates[-1]),
        test=values["test"],
        mean=_mean(values["test"]),
        gap=_mean(gaps),
        steps=None if math.isinf(steps) else int(steps),
        seconds=None if math.isinf(steps) or not paces else steps * statistics.median(paces),
        near=_decades(tuning, task, best),
        near_own=_decades(tuning, task, own),
        diverged=sum(trial.diverged for trial in tuning),
        tried=len(tuning),
    )


def _decades(tuning: Sequence[Trial], task: Task, best: float) -> float:
    """Half a decade for each learning rate that is near the best."""
    if math.isinf(best):
        return 0.0
    return 0.5 * sum(worth(trial, task) >= best - NEAR * abs(best) for trial in tuning)


def _mean(values: Sequence[Any]) -> float | None:
    """None if there is none, or one that is no number."""
    return None if not values or None in values else statistics.fmean(values)
