"""How an optimizer is tuned: half-decades of its learning rate, then further seeds at the best."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import tasks
from benchmarks.optimizers import CONTENDERS
from benchmarks.sweep.jobs import Remember, Run
from benchmarks.sweep.trial import Trial, Trials
from benchmarks.tasks import Task

__all__ = ["Plan", "best_rate", "half_decade", "next_index", "tune", "work", "worth"]


class Plan(NamedTuple):
    """How much a sweep spends on each optimizer.

    Attributes:
      rates: learning rates to try, with seed 0.
      seeds: further seeds at the best of them.
      length: how many times a task's steps in a sweep.
      batch_size: how many times a task's batch size.
    """

    rates: int
    seeds: int
    length: float
    batch_size: int

    def steps(self, task: Task) -> int:
        """Of one run."""
        return max(1, round(task.sweep * self.length))


def work(name: str, optimizer: str, plan: Plan, remember: Remember) -> None:
    """Runs all trials of one optimizer on one task, given their names."""
    task = tasks.load(name)
    trials = Trials(task, optimizer, plan.steps(task), task.batch_size * plan.batch_size)
    tune(remember(trials), task, optimizer, plan)


def tune(trial: Run, task: Task, optimizer: str, plan: Plan) -> None:
    """Asks for as many trials of one optimizer as of any other.

    Args:
      trial: runs one, given a learning rate and a seed.
      task: the task.
      optimizer: a key of `CONTENDERS`.
      plan: how many trials.
    """
    start = round(2 * math.log10(CONTENDERS[optimizer].rate))
    tried: dict[int, float] = {}
    trials = []
    while len(tried) < plan.rates:
        index = next_index(tried, start)
        trials.append(trial(half_decade(index), 0))
        tried[index] = worth(trials[-1], task)
    for seed in range(1, plan.seeds + 1):
        trial(best_rate(trials, task), seed)


def half_decade(index: int) -> float:
    """The index-th half-decade: 1 at 0, 3.16 at 1, 0.316 at -1."""
    return float(f"{10 ** (index / 2):.3g}")


def worth(trial: Trial, task: Task) -> float:
    """The final validation metric, larger is better; -inf for a trial that diverged."""
    value = trial.results["validation"]
    if value is None or trial.diverged:
        return -math.inf
    return value if task.higher_is_better else -value


def best_rate(trials: Sequence[Trial], task: Task) -> float:
    """The learning rate with the best validation metric among trials of one seed."""
    return max(trials, key=lambda trial: worth(trial, task)).learning_rate


def next_index(tried: Mapping[int, float], start: int) -> int:
    """The half-decade to try next.

    The first three lie around the start and each further one beside the better end, so that the
    best comes to lie between others.

    Args:
      tried: half-decades in a row, and what each is worth.
      start: the half-decade to begin with.

    Returns:
      One that is not in `tried`.
    """
    for first in (start, start - 1, start + 1):
        if first not in tried:
            return first
    low, high = min(tried), max(tried)
    best = max(tried, key=lambda index: tried[index])
    # Of two ends that are alike, the one nearer to the best.
    upwards = (tried[high], best - low) >= (tried[low], high - best)
    return high + 1 if upwards else low - 1
