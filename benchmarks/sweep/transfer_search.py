"""The best learning rate to within a factor of √2, and which trials it takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.optimizers import CONTENDERS
from benchmarks.sweep.families import FAMILIES
from benchmarks.sweep.jobs import Remember
from benchmarks.sweep.trial import Trial, Trials

__all__ = ["SEEDS", "TRIALS", "Best", "best", "final_loss", "find", "rate_of", "work"]

# Indices count factors of √2. The search first takes steps of a factor of 4.
STRIDE = 4
MOST_STRIDES = 8
SEEDS = 2
# About how many it takes.
TRIALS = 12


def work(family: str, size: int, optimizer: str, length: float, remember: Remember) -> None:
    """Runs all trials of one optimizer on one size of a family, `length` times the steps."""
    member = FAMILIES[family].member(size, length)
    trial = remember(Trials(member.task, optimizer, member.steps, member.batch_size))
    start = round(2 * math.log2(CONTENDERS[optimizer].rate))
    find(lambda index, seed: final_loss(trial(rate_of(index), seed)), start)


def find(loss: Callable[[int, int], float], start: int) -> int:
    """Looks for the best learning rate, the more finely the nearer.

    Args:
      loss: of an index and a seed.
      start: where to begin.

    Returns:
      The index with the least mean loss over `SEEDS`: between two others that were tried, unless
      it lies further away than the search goes.
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


def final_loss(trial: Trial) -> float:
    """The mean training loss of the last tenth; infinite where the run diverged."""
    last = trial.losses[-1]
    return math.inf if trial.diverged or last is None else last


class Best(NamedTuple):
    """A learning rate, the mean of its losses over the seeds, and their range."""

    learning_rate: float
    loss: float
    range: float


def best(trials: Sequence[Trial]) -> Best | None:
    """The best learning rate of those tried with every seed, none of which diverged; of one size.

    Args:
      trials: of one optimizer and size.
    """
    losses: dict[float, dict[int, float]] = {}
    for trial in trials:
        losses.setdefault(trial.learning_rate, {})[trial.seed] = final_loss(trial)
    whole = {
        rate: list(own.values())
        for rate, own in losses.items()
        if len(own) == SEEDS and all(map(math.isfinite, own.values()))
    }
    if not whole:
        return None
    rate = min(whole, key=lambda rate: sum(whole[rate]))
    return Best(rate, sum(whole[rate]) / SEEDS, max(whole[rate]) - min(whole[rate]))
