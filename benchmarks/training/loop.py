"""The training loop: a donated jitted step, a log, and checkpoints to go on from."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from benchmarks import machine, optimizers
from benchmarks.runs import Entry, Log, number
from benchmarks.tasks import SPLITS, Task
from optax_unitscale import layers_of, recorded_norms


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the outcome of one run."""

    task: str
    preset: str
    data_sha256: str
    optimizer: str
    learning_rate: float
    steps: int
    batch_size: int
    seed: int


def describe(config: Config) -> Entry:
    """The entry that opens a run: its configuration, its data, and what computed it."""
    packages = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")
    return {"kind": "run", **dataclasses.asdict(config), **machine.about(*packages)}


def train(config: Config, task: Task, log: Log, every: int) -> Iterator[tuple[int, float]]:
    """Trains from the last checkpoint, or from the start, and yields `(step, loss)` after each.

    Every step is a function of the state and of `(seed, step)` alone, so a run that was killed and
    goes on from a checkpoint ends in the same bits as one that never stopped, given the same
    versions and the same number of CPU cores: XLA divides its sums among the cores.

    The log receives the run, every step, the task's evaluations, the result on all splits, and a
    sample; a checkpoint `every` so many steps lies beside it.
    """
    name, model = config.optimizer, task.model(config.seed)
    transformation = optimizers.make(name, config.learning_rate, config.steps, layers_of(model))
    graph, state = nnx.split((model, nnx.Optimizer(model, transformation, wrt=nnx.Param)))
    step_function = _compile(graph, task)
    parts = range(1, task.evaluations + 1)
    evaluate_at = {max(1, config.steps * i // task.evaluations) for i in parts}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    folder = (log.path.parent / "checkpoints" / name).absolute()
    with ocp.CheckpointManager(folder, options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            target = ocp.args.StandardRestore(nnx.to_pure_dict(state))
            nnx.replace_by_pure_dict(state, dict(manager.restore(done, args=target)))
        log.keep(lambda e: e.get("optimizer") != name or e.get("step", 0) <= done)
        if not log.of("run", name):
            log.append(**describe(config))
        for step in range(done + 1, config.steps + 1):
            start = time.perf_counter()
            batch = task.batch(config.seed, step, config.batch_size)
            state, loss, norms = step_function(state, batch)
            loss, norms = jax.device_get((loss, norms))
            seconds = time.perf_counter() - start
            entry: Entry = {"optimizer": name, "step": step}
            norms = {path: number(norm) for path, norm in norms.items()}
            log.append(kind="step", **entry, loss=number(loss), seconds=seconds, norms=norms)
            if step in evaluate_at:
                value = task.evaluate(nnx.merge(graph, state)[0], "validation")
                log.append(kind="evaluation", **entry, value=number(value))
            # After the log, so that a checkpoint is never ahead of it.
            if step % every == 0 or step == config.steps:
                manager.save(step, args=ocp.args.StandardSave(nnx.to_pure_dict(state)))
            yield step, float(loss)
    model = nnx.merge(graph, state)[0]
    if not log.of("result", name):
        values = {split: number(task.evaluate(model, split)) for split in SPLITS}
        log.append(kind="result", optimizer=name, **values)
    if not log.of("sample", name):
        log.append(kind="sample", optimizer=name, text=task.sample(model, config.seed))


def _compile(graph: Any, task: Task) -> Callable[..., Any]:
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(task.loss)(model, batch)
        optimizer.update(model, gradients)
        norms = recorded_norms(optimizer.opt_state, nnx.state(model, nnx.Param))
        return nnx.state((model, optimizer)), loss, norms

    return step
