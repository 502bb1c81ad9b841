"""One training run of a sweep: quick, without checkpoints, for any learning rate and seed."""

import dataclasses
import functools
import math
import time

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks import optimizers
from benchmarks.runs import number
from benchmarks.tasks import SPLITS, Task
from optax_unitscale import layers_of

# Into how many parts of equal length a run is divided.
PARTS = 10


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a run came to; None stands for what is no number, and in losses for the run's end."""

    optimizer: str
    learning_rate: float  # The schedule's peak.
    seed: int  # Of weights and batches.
    losses: list[float | None]  # Of the first step, then the mean of each of `PARTS`.
    results: dict[str, float | None]  # The final metric of each split.
    # What a step takes, the first left out; on CPU of all cores' time, which does not depend on
    # what else they do.
    seconds: float | None
    decay: float | None = None  # Of weights, where it is not the contender's default.

    @property
    def setting(self) -> tuple[float, float | None]:
        """What is tuned."""
        return self.learning_rate, self.decay

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being a number, or ended at twice what it began with."""
        first, *_, last = self.losses
        return first is None or last is None or last > 2 * first

    @property
    def loss(self) -> float:
        """The mean training loss of the last tenth; infinite where the run diverged."""
        last = self.losses[-1]
        return math.inf if self.diverged or last is None else last


class Trials:
    """Runs trials of one optimizer on one task; all of them share what XLA compiled."""

    def __init__(self, task: Task, optimizer: str, steps: int, batch_size: int):
        self._task, self._optimizer = task, optimizer
        self._steps, self._batch_size = steps, batch_size
        self._step = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))(
            self._take
        )

    def run(self, learning_rate: float, seed: int, decay: float | None = None) -> Trial:
        """Trains from the start; a trial whose loss is no number ends there."""
        task = self._task
        graph, params, others = nnx.split(model := task.model(seed), nnx.Param, ...)
        state = self._transformation(learning_rate, model, decay).init(params)
        clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
        # Fewer where there are fewer steps.
        ends = sorted({max(1, self._steps * i // PARTS) for i in range(1, PARTS + 1)})
        rate, done = np.float32(learning_rate), 0
        losses, durations = [], []
        for end in ends:
            taken = []
            start = clock()
            for step in range(done + 1, end + 1):
                batch = task.batch(seed, step, self._batch_size)
                params, state, loss = self._step(graph, decay, params, state, others, batch, rate)
                taken.append(loss)
            taken = jax.device_get(taken)
            durations.append((clock() - start) / len(taken))
            done = end
            losses += [float(taken[0])] if not losses else []
            losses.append(float(np.mean(taken)))
            if not math.isfinite(losses[-1]):
                break
        whole = math.isfinite(losses[-1])
        model = nnx.merge(graph, params, others)
        return Trial(
            optimizer=self._optimizer,
            learning_rate=learning_rate,
            seed=seed,
            losses=list(map(number, losses)),
            results={x: number(task.evaluate(model, x)) if whole else None for x in SPLITS},
            # The first steps compile.
            seconds=number(np.median(durations[1:] or durations)),
            decay=decay,
        )

    def _take(self, graph, decay, params, state, others, batch, rate):
        model = nnx.merge(graph, params, others)
        loss, gradient = nnx.value_and_grad(self._task.loss)(model, batch)
        updates, state = self._transformation(rate, model, decay).update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def _transformation(self, rate, model, decay):
        return optimizers.make(self._optimizer, rate, self._steps, layers_of(model), decay)
