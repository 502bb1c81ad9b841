"""How an optimizer is tuned: half-decades of its learning rate, then further seeds at the best."""

import math
from collections.abc import Callable, Mapping

from benchmarks.optimizers import CONTENDERS
from benchmarks.sweep.trial import Trial
from benchmarks.tasks import Task

__all__ = ["best_rate", "half_decade", "next_index", "tune"]


def tune(
    trial: Callable[[float, int], Trial], task: Task, optimizer: str, rates: int, seeds: int
) -> None:
    """Runs as many trials for one optimizer as for any other.

    Args:
      trial: runs one, given a learning rate and a seed.
      task: the task.
      optimizer: a key of `CONTENDERS`.
      rates: how many learning rates to try, with seed 0.
      seeds: how many further seeds to run with the best of them.
    """
    start = round(2 * math.log10(CONTENDERS[optimizer].rate))
    tried: dict[int, float] = {}
    trials = []
    while len(tried) < rates:
        index = next_index(tried, start)
        trials.append(trial(half_decade(index), 0))
        tried[index] = worth(trials[-1], task)
    for seed in range(1, seeds + 1):
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


def best_rate(trials: list[Trial], task: Task) -> float:
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
