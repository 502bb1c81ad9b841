"""The best learning rate to within a factor of √2, and which trials it takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.optimizers import CONTENDERS
from benchmarks.sweep.families import FAMILIES
from benchmarks.sweep.jobs import Tell
from benchmarks.sweep.trial import Trial, Trials

__all__ = ["SEEDS", "TRIALS", "Job", "best", "final_loss", "find", "rate_of", "work"]

# Indices count factors of √2. The search first takes steps of a factor of 4.
STRIDE = 4
MOST_STRIDES = 8
SEEDS = 2
# About how many it takes.
TRIALS = 12


class Job(NamedTuple):
    """All trials of one optimizer on one size of a family.

    Attributes:
      family: a key of `FAMILIES`.
      size: one of its sizes.
      optimizer: a key of `CONTENDERS`.
      length: how many times the steps.
      done: the trials that an earlier sweep has.
    """

    family: str
    size: int
    optimizer: str
    length: float
    done: Sequence[Trial] = ()

    def __str__(self) -> str:
        """What errors and the progress bar say."""
        return f"{self.optimizer} on {self.family} {self.size}"


def work(job: Job, tell: Tell) -> None:
    """Runs what is missing of a job."""
    member = FAMILIES[job.family].member(job.size, job.length)
    trials = Trials(member.task, job.optimizer, member.steps, member.batch_size)
    done = {(trial.learning_rate, trial.seed): trial for trial in job.done}

    def loss(index: int, seed: int) -> float:
        key = (rate_of(index), seed)
        if key not in done:
            done[key] = trials.run(*key, lambda share: tell(share, None))
            tell(0.0, done[key])
        return final_loss(done[key])

    find(loss, round(2 * math.log2(CONTENDERS[job.optimizer].rate)))


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


def best(trials: Sequence[Trial]) -> tuple[float, float, float] | None:
    """The best learning rate of those tried with every seed.

    Args:
      trials: of one optimizer and size.

    Returns:
      The rate, the mean of its losses over the seeds, and their range; None if there is none with
      which no seed diverged.
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
    return rate, sum(whole[rate]) / SEEDS, max(whole[rate]) - min(whole[rate])
