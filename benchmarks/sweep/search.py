"""Which learning rates a sweep tries: `tune` asks for as many of each optimizer, `find` is finer.

`compare` tunes in half-decades, then runs further seeds at the best. `transfer` finds the best to
within a factor of √2, with two seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.optimizers import Contender
from benchmarks.sweep.jobs import Run
from benchmarks.sweep.trial import Trial
from benchmarks.tasks import Task

# The indices of `find` count factors of √2. The search first takes steps of a factor of 4.
STRIDE = 4
MOST_STRIDES = 8
SEEDS = 2
# About how many it takes.
TRIALS = 12


class Plan(NamedTuple):
    """How much `compare` spends on each optimizer.

    So many learning rates with seed 0, the contender's weight decays at the best, then so many
    seeds at the best of all; `length` times a task's steps.
    """

    rates: int
    seeds: int
    length: float

    def steps(self, task: Task) -> int:
        """Of one run."""
        return max(1, round(task.steps * self.length))


def tune(trial: Run, task: Task, contender: Contender, plan: Plan) -> None:
    """Asks for the trials of a plan, beginning around the contender's learning rate."""
    start = round(2 * math.log10(contender.rate))
    tried: dict[int, float] = {}
    trials = [] if contender.tuned else [trial(contender.rate, 0)]
    while contender.tuned and len(tried) < plan.rates:
        index = next_index(tried, start)
        trials.append(trial(half_decade(index), 0))
        tried[index] = worth(trials[-1], task)
    rate = best(trials, task).learning_rate
    trials += [trial(rate, 0, decay) for decay in contender.decays]
    for seed in range(1, plan.seeds + 1):
        found = best(trials, task)
        trial(found.learning_rate, seed, found.decay)


def half_decade(index: int) -> float:
    """The index-th half-decade: 1 at 0, 3.16 at 1, 0.316 at -1."""
    return float(f"{10 ** (index / 2):.3g}")


def worth(trial: Trial, task: Task) -> float:
    """The final validation metric, larger is better; -inf for a trial that diverged."""
    value = trial.results["validation"]
    if value is None or trial.diverged:
        return -math.inf
    return value if task.higher_is_better else -value


def best(trials: Sequence[Trial], task: Task) -> Trial:
    """The trial with the best validation metric among trials of one seed."""
    return max(trials, key=lambda trial: worth(trial, task))


def next_index(tried: Mapping[int, float], start: int) -> int:
    """The half-decade to try after some in a row, given what each of them is worth.

    The first three lie around the start and each further one beside the better end, so that the
    best comes to lie between others.
    """
    for first in (start, start - 1, start + 1):
        if first not in tried:
            return first
    low, high = min(tried), max(tried)
    top = max(tried, key=lambda index: tried[index])
    # Of two ends that are alike, the one nearer to the best.
    upwards = (tried[high], top - low) >= (tried[low], high - top)
    return high + 1 if upwards else low - 1


def find(loss: Callable[[int, int], float], start: int) -> int:
    """Looks for the best learning rate, the more finely the nearer: the index of the least loss.

    The loss is of an index and a seed. What is found has the least mean over `SEEDS`, and lies
    between two others that were tried, unless it is further away than the search goes.
    """
    tried = {index: loss(index, 0) for index in (start - STRIDE, start, start + STRIDE)}
    while len(tried) < MOST_STRIDES and _least(tried) in (min(tried), max(tried)):
        end = _least(tried)
        further = end - STRIDE if end == min(tried) else end + STRIDE
        tried[further] = loss(further, 0)
    step = STRIDE // 2
    while step:
        for index in (_least(tried) - step, _least(tried) + step):
            tried.setdefault(index, loss(index, 0))
        step //= 2
    means: dict[int, float] = {}
    while True:
        found = _least(means or tried)
        missing = [index for index in (found - 1, found, found + 1) if index not in means]
        if not missing or len(means) > 2 * STRIDE:
            return found
        for index in missing:
            means[index] = sum(loss(index, seed) for seed in range(SEEDS)) / SEEDS


def _least(losses: Mapping[int, float]) -> int:
    return min(losses, key=lambda index: (losses[index], index))


def rate_of(index: int) -> float:
    """√2 to the index."""
    return float(f"{2 ** (index / 2):.4g}")
