"""The training loop: a donated jitted step, checkpoints, and what goes on after a crash."""

import dataclasses
import functools
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import matplotlib.pyplot as plt
import orbax.checkpoint as ocp
from flax import nnx

from benchmarks import machine, optimizers
from benchmarks.arguments import UsageError
from benchmarks.runs import Entry, Log
from benchmarks.tasks import SPLITS, Task
from benchmarks.training.sharding import Layout
from optax_unitscale import layers_of, recorded_norms


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the outcome of one run."""

    task: str
    data_sha256: str
    optimizer: str
    learning_rate: float
    steps: int
    batch_size: int
    seed: int


def describe(config: Config, layout: Layout) -> Entry:
    """The entry that opens a run: its configuration, its data, and what computed it."""
    return {
        "kind": "run",
        **dataclasses.asdict(config),
        **machine.about("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy"),
        "mesh": dict(layout.mesh.shape) if layout.mesh else None,
        "processes": jax.process_count(),
    }


def train(
    config: Config,
    task: Task,
    log: Log,
    every: int,
    layout: Layout,
    say: Callable[[str], Any],
) -> Iterator[tuple[int, float]]:
    """Trains from the last checkpoint, or from the start, and yields `(step, loss)` after each.

    Every step is a function of the state and of `(seed, step)` alone, so a run that was killed and
    goes on from a checkpoint ends in the same bits as one that never stopped, given the same
    versions and the same number of CPU cores: XLA divides its sums among the cores. On a mesh the
    same holds for the same mesh; another mesh, or one device, gives the same losses to within
    rounding. The processes of a run share the folder of checkpoints and call this alike.

    The log receives the run, every step, the task's evaluations, the result on all splits, and a
    sample; a picture of it, and a checkpoint `every` so many steps, lie beside the log. What can
    be said in a line goes to `say`. Closing the iterator early is safe.
    """
    model = task.model(config.seed)
    transformation = optimizers.make(
        config.optimizer, config.learning_rate, config.steps, layers_of(model)
    )
    graph, state = nnx.split((model, nnx.Optimizer(model, transformation, wrt=nnx.Param)))
    state = layout.place(state)
    rows = layout.rows(config.batch_size)
    step_function = _compile(graph, task, layout, state)
    parts = range(1, task.evaluations + 1)
    evaluate_at = {max(1, config.steps * i // task.evaluations) for i in parts}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    folder = (log.path.parent / "checkpoints" / config.optimizer).absolute()
    # Without its handler, Orbax would guess from the folder, which may be damaged.
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(folder, options=options, item_handlers=handler) as manager:
        done = _restore(manager, state, say)
        log.keep(lambda e: e.get("optimizer") != config.optimizer or e.get("step", 0) <= done)
        if not log.of("run", config.optimizer):
            log.append(**describe(config, layout))
        for step in range(done + 1, config.steps + 1):
            start = time.perf_counter()
            batch = task.batch(config.seed, step, config.batch_size, rows)
            batch = layout.place_batch(batch, config.batch_size)
            state, loss, norms = step_function(state, batch)
            loss, norms = jax.device_get((loss, norms))
            seconds = time.perf_counter() - start
            entry: Entry = {"optimizer": config.optimizer, "step": step}
            norms = {name: _number(norm) for name, norm in norms.items()}
            log.append(kind="step", **entry, loss=_number(loss), seconds=seconds, norms=norms)
            if step in evaluate_at:
                value = task.evaluate(layout.collect(nnx.merge(graph, state)[0]), "validation")
                log.append(kind="evaluation", **entry, value=_number(value))
            # After the log, so that a checkpoint is never ahead of it.
            if step % every == 0 or step == config.steps:
                _save(manager, step, state)
            yield step, float(loss)
        _conclude(config, task, log, layout.collect(nnx.merge(graph, state)[0]))


def _restore(manager: ocp.CheckpointManager, state: Any, say: Callable[[str], Any]) -> int:
    """Takes the last checkpoint that can be read; its step, 0 where there is none."""
    target = ocp.args.StandardRestore(nnx.to_pure_dict(state))
    damaged: dict[int, str] = {}
    # What is wrong is said below, in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    for step in sorted(manager.all_steps(), reverse=True):
        # Orbax and the libraries below it raise what they like.
        try:
            restored = manager.restore(step, args=target)
        except Exception as error:
            damaged[step] = " ".join(str(error).split())[:200]
            continue
        nnx.replace_by_pure_dict(state, dict(restored))
        for other in damaged:
            say(f"Checkpoint {manager.directory / str(other)} is damaged: going on from {step}.")
            # Only now: an older one can be read, so the reason lies in this one.
            manager.delete(other)
        return step
    if damaged:
        raise UsageError(
            f"argument --resume: cannot read any checkpoint in {manager.directory}: "
            f"{next(iter(damaged.values()))}; delete that folder to start anew"
        )
    return 0


def _save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    # Orbax tells of a full disk in hundreds of lines.
    if shutil.disk_usage(manager.directory).free < sum(x.nbytes for x in jax.tree.leaves(state)):
        raise OSError(f"no space left for checkpoint {step} in {manager.directory}")
    manager.save(step, args=ocp.args.StandardSave(nnx.to_pure_dict(state)))


def _conclude(config: Config, task: Task, log: Log, model: nnx.Module) -> None:
    """Adds what a trained model is worth, and what it can do, where the log lacks it."""
    if not log.of("result", config.optimizer):
        values = {split: _number(task.evaluate(model, split)) for split in SPLITS}
        log.append(kind="result", optimizer=config.optimizer, **values)
    if log.of("sample", config.optimizer):
        return
    if task.draw and log.writes:
        figure = task.draw(model)
        figure.savefig(log.path.parent / f"sample_{config.optimizer}.png", dpi=130)
        plt.close(figure)
    text = task.sample(model, config.seed)
    log.append(kind="sample", optimizer=config.optimizer, text=text)


def _compile(graph: Any, task: Task, layout: Layout, state: Any) -> Callable[..., Any]:
    outputs = (layout.shardings(state), layout.over(), layout.over())

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=outputs)
    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(task.loss)(model, batch)
        optimizer.update(model, gradients)
        norms = recorded_norms(optimizer.opt_state, nnx.state(model, nnx.Param))
        return nnx.state((model, optimizer)), loss, norms

    return step


def _number(value: Any) -> float | None:
    # JSON has neither NaN nor infinity.
    return float(value) if math.isfinite(value) else None
