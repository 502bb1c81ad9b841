"""One training run of a sweep: quick, without checkpoints, for any learning rate and seed."""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks import optimizers
from benchmarks.tasks import SPLITS, Task
from optax_unitscale import layers_of

__all__ = ["EVALUATIONS", "Trial", "Trials"]

EVALUATIONS = 10


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a run came to.

    Attributes:
      optimizer: its name.
      learning_rate: the schedule's peak.
      seed: of weights and batches.
      losses: of the first step; then the mean of the steps up to each of `EVALUATIONS` equally
        spaced ones. None stands for what is no number and for the end of the run.
      curve: the validation metric at the same steps.
      results: the final metric of each split.
      reached: the step of the first evaluation that was at the target, or None.
      seconds: what a step takes, the first steps left out; on CPU of the cores' time, which does
        not depend on what else they do.
    """

    optimizer: str
    learning_rate: float
    seed: int
    losses: list[float | None]
    curve: list[float | None]
    results: dict[str, float | None]
    reached: int | None
    seconds: float | None

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being a number, or ended at twice what it began with."""
        first, *_, last = self.losses
        return first is None or last is None or last > 2 * first


class Trials:
    """Runs trials of one optimizer on one task; all of them share what XLA compiled."""

    def __init__(self, task: Task, optimizer: str, steps: int, batch_size: int):
        """Takes the task, the optimizer's name, and the length and batch size of each run."""
        self._task = task
        self._optimizer = optimizer
        self._steps = steps
        self._batch_size = batch_size
        self._step = functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))(self._take)

    def run(self, learning_rate: float, seed: int) -> Trial:
        """Trains from the start; a trial whose loss is no number ends there."""
        task = self._task
        graph, params, others = nnx.split(model := task.model(seed), nnx.Param, ...)
        transformation = self._transformation(learning_rate, model)
        state = transformation.init(params)
        clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
        # Fewer where there are fewer steps.
        ends = sorted({max(1, self._steps * i // EVALUATIONS) for i in range(1, EVALUATIONS + 1)})
        rate, done = np.float32(learning_rate), 0
        losses, curve, durations = [], [], []
        for end in ends:
            taken = []
            start = clock()
            for step in range(done + 1, end + 1):
                batch = task.batch(seed, step, self._batch_size, slice(None))
                params, state, loss = self._step(graph, params, state, others, batch, rate)
                taken.append(loss)
            taken = jax.device_get(taken)
            durations.append((clock() - start) / len(taken))
            done = end
            losses += [float(taken[0])] if not losses else []
            losses.append(float(np.mean(taken)))
            if not math.isfinite(losses[-1]):
                break
            curve.append(task.evaluate(nnx.merge(graph, params, others), "validation"))
        whole = len(curve) == len(ends)
        model = nnx.merge(graph, params, others)
        return Trial(
            optimizer=self._optimizer,
            learning_rate=learning_rate,
            seed=seed,
            losses=list(map(_number, losses)),
            curve=list(map(_number, curve)),
            results={x: _number(task.evaluate(model, x)) if whole else None for x in SPLITS},
            reached=next(
                (e for e, v in zip(ends, curve, strict=False) if task.better(v, task.target)), None
            ),
            # The first steps compile.
            seconds=_number(np.median(durations[1:] or durations)),
        )

    def _take(self, graph, params, state, others, batch, rate):
        model = nnx.merge(graph, params, others)
        loss, gradient = nnx.value_and_grad(self._task.loss)(model, batch)
        transformation = self._transformation(rate, model)
        updates, state = transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def _transformation(self, rate, model):
        return optimizers.make(self._optimizer, rate, self._steps, layers_of(model))


def _number(value: Any) -> float | None:
    # JSON has neither NaN nor infinity.
    return float(f"{float(value):.6g}") if math.isfinite(value) else None
