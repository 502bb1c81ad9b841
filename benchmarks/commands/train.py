"""Trains the same model on the same batches with each optimizer, and compares them."""

import argparse
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence

import matplotlib as mpl
from rich.console import Console

from benchmarks import data, interrupt, runs
from benchmarks.arguments import UsageError, add_out, add_several, count, positive
from benchmarks.optimizers import CONTENDERS, SHOWN
from benchmarks.runs import Log
from benchmarks.tasks import TASKS, Task, load, summary
from benchmarks.training import loop, processes, report
from benchmarks.training.sharding import Layout

__all__ = ["EPILOG", "add_arguments", "run"]

# What --help ends with.
EPILOG = "tasks:\n" + "\n".join(f"  {name:<22}{summary(name)}" for name in TASKS)

# jax.random.key ignores the bits above.
LARGEST_SEED = 2**32 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    escaped = str(data.folder()).replace("%", "%%")
    add(
        "--task",
        choices=TASKS,
        default="language_modelling",
        help="what to learn (default: %(default)s). Some read packages from the package index as "
        f"data, kept in {escaped} or where {data.FOLDER_VARIABLE} says",
    )
    add(
        "--steps",
        type=count(),
        metavar="N",
        help="training steps for each optimizer (default: the task's)",
    )
    what = "an optimizer to train with"
    add_several(parser, "--optimizer", what, ", ".join(SHOWN), choices=tuple(CONTENDERS))
    add(
        "--learning-rate",
        type=positive,
        metavar="RATE",
        help="peak learning rate of every optimizer (default: the task's for each)",
    )
    add(
        "--seed",
        type=count(0, LARGEST_SEED),
        default=0,
        metavar="N",
        help="decides weights, batches and samples (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=count(),
        metavar="N",
        help="examples in a batch (default: the task's)",
    )
    add(
        "--checkpoint-every",
        type=count(),
        default=200,
        metavar="N",
        help="steps between checkpoints (default: %(default)s)",
    )
    add_out(parser, "metrics, figures and checkpoints", "run")
    processes.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Trains, writes, prints; returns the exit status."""
    # Figures go to files; a desktop's windows would come between.
    mpl.use("Agg")
    task = load(options.task)
    batch_size = options.batch_size or task.batch_size
    processes.check_arguments(options, batch_size)
    configs = [
        loop.Config(
            task=options.task,
            data_sha256=task.fingerprint,
            optimizer=name,
            learning_rate=options.learning_rate
            or task.learning_rates.get(name, CONTENDERS[name].rate),
            steps=options.steps or task.steps,
            batch_size=batch_size,
            seed=options.seed,
        )
        for name in dict.fromkeys(options.optimizer or SHOWN)
    ]
    with processes.joined(options, batch_size) as mesh:
        # Without a mesh there is but one process.
        is_first = mesh is None or processes.is_first()
        resume, holds = options.resume, ("metrics.jsonl", "checkpoints")
        with runs.folder("train", options.out, resume, holds, lock=is_first) as out:
            log = Log(out / "metrics.jsonl")
            _check_resumed(log, configs)
            processes.check_same(
                mesh, (configs, options.mesh, options.checkpoint_every, log.entries)
            )
            log.writes = is_first
            return _train(options, configs, task, log, Layout(mesh))


def _check_resumed(log: Log, configs: Sequence[loop.Config]) -> None:
    """Refuses to go on with a run that was started otherwise."""
    for config in configs:
        saved = log.of("run", config.optimizer)
        # Without its configuration a checkpoint could be any run's.
        if not saved and any((log.path.parent / "checkpoints" / config.optimizer).glob("*")):
            raise UsageError(
                f"argument --resume: {log.path} does not say which run the checkpoints of "
                f"{config.optimizer} belong to; restore that file or name another folder for --out"
            )
        for field, value in dataclasses.asdict(config).items():
            if saved and saved[0].get(field) != value:
                raise UsageError(
                    f"argument --resume: the run in {log.path.parent} has {field} "
                    f"{saved[0].get(field)} for {config.optimizer}, not {value}; repeat its options"
                )


def _train(
    options: argparse.Namespace,
    configs: Sequence[loop.Config],
    task: Task,
    log: Log,
    layout: Layout,
) -> int:
    """Trains with one optimizer after the other, then shows what came of it."""
    names, out = [config.optimizer for config in configs], log.path.parent
    console = Console(quiet=not log.writes)
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    say(f"{options.task}: {', '.join(names)}; writing to {out}")
    if options.coordinator:
        say(f"If one process dies, all end within a minute. {processes.ADVICE}")
    if options.resume and not log.entries:
        say("There is no run yet to resume; starting one.")
    moment = itertools.count(1)
    with interrupt.deferred() as stop, report.progress(console, task.unit) as bar:

        def finishes(config: loop.Config) -> bool:
            row = bar.add_task(config.optimizer, total=config.steps, loss=None, rate=0.0)
            every = options.checkpoint_every
            for step, loss in loop.train(config, task, log, every, layout, say):
                rate = config.batch_size * task.tokens * (bar.tasks[row].speed or 0.0)
                bar.update(row, completed=step, loss=loss, rate=rate)
                if processes.stopped(stop, next(moment)):
                    return False
            bar.update(row, completed=config.steps)
            return True

        finished = all(map(finishes, configs))
        bar.stop()
        if log.writes:
            _show(console, log, names, task, out)
    if not finished:
        say(f"Stopped. Go on with the same options and --resume --out {out}")
    return 0 if finished else interrupt.INTERRUPTED


def _show(console: Console, log: Log, names: list[str], task: Task, out: pathlib.Path) -> None:
    started = [name for name in names if log.of("step", name)]
    if not started:
        return
    console.print(report.table(log, started, task))
    for panel in report.samples(log, started):
        console.print(panel)
    report.plot_losses(log, started, task, out / "losses.png")
    report.plot_gradient_norms(log, started, out / "gradient_norms.png")
    drawn = [path.name for name in started if (path := out / f"sample_{name}.png").exists()]
    for name in ("losses.png", "gradient_norms.png", *drawn, "metrics.jsonl"):
        console.print(f"wrote {out / name}", soft_wrap=True)
    if said := report.verdict(log, started, task):
        console.print(said, soft_wrap=True)
