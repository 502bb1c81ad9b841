"""Trains the same model on the same batches with each optimizer, and compares them."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from benchmarks import interrupt, runs, show
from benchmarks.arguments import UsageError, add, add_out, count, positive
from benchmarks.data import FOLDER_VARIABLE, folder
from benchmarks.optimizers import CONTENDERS, SHOWN
from benchmarks.runs import Log
from benchmarks.tasks import TASKS, Task, load, summary, tuned
from benchmarks.training import loop, processes, report
from benchmarks.training.sharding import Layout

# What --help ends with.
EPILOG = "tasks:\n" + "\n".join(f"  {name:<22}{summary(name)}" for name in TASKS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    what = f"what to learn; some read packages from the package index as data, kept in {folder()}"
    what += f" or where {FOLDER_VARIABLE} says"
    add(parser, "--task", what, default="language_modelling", choices=TASKS)
    add(parser, "--steps N", "training steps for each optimizer (default: the task's)", count())
    what = "an optimizer to train with"
    add(parser, "--optimizer", what, several=", ".join(SHOWN), choices=tuple(CONTENDERS))
    what = "peak learning rate of every optimizer (default: the task's for each)"
    add(parser, "--learning-rate RATE", what, positive)
    # jax.random.key ignores the bits above.
    add(parser, "--seed N", "decides weights, batches and samples", count(0, 2**32 - 1), default=0)
    add(parser, "--batch-size N", "examples in a batch (default: the task's)", count())
    add(parser, "--checkpoint-every N", "steps between checkpoints", count(), default=200)
    add_out(parser, "metrics, figures and checkpoints", "run")
    processes.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Trains, writes, prints; returns the exit status."""
    task = load(options.task)
    batch_size = options.batch_size or task.batch_size
    processes.check_arguments(options, batch_size)
    rates = {name: contender.rate for name, contender in CONTENDERS.items()} | tuned(options.task)
    configs = [
        loop.Config(
            task=options.task,
            data_sha256=task.fingerprint,
            optimizer=name,
            learning_rate=options.learning_rate or (rates | dict(task.learning_rates))[name],
            steps=options.steps or task.steps,
            batch_size=batch_size,
            seed=options.seed,
        )
        for name in dict.fromkeys(options.optimizer or SHOWN)
    ]
    with processes.joined(options, batch_size) as mesh:
        # Without a mesh there is but one process.
        is_first = mesh is None or jax.process_index() == 0
        resume, holds = options.resume, ("metrics.jsonl", "checkpoints")
        with runs.folder("train", options.out, resume, holds, lock=is_first) as out:
            log = Log(out / "metrics.jsonl")
            _check_resumed(log, configs)
            processes.check_same((configs, options.mesh, options.checkpoint_every, log.entries))
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
    with interrupt.deferred() as stop, report.progress(console) as bar:

        def finishes(config: loop.Config) -> bool:
            row = bar.add_task(config.optimizer, total=config.steps, now="")
            every = options.checkpoint_every
            for step, loss in loop.train(config, task, log, every, layout, say):
                rate = config.batch_size * task.tokens * (bar.tasks[row].speed or 0.0)
                now = f"loss {loss:.3f} {rate:,.0f} {task.unit}/s"
                bar.update(row, completed=step, now=now)
                if processes.stopped(stop, next(moment)):
                    return False
            bar.update(row, completed=config.steps)
            return True

        finished = all(map(finishes, configs))
        bar.stop()
        if log.writes:
            _show(console, log, [name for name in names if log.of("step", name)], task)
    if not finished:
        say(f"Stopped. Go on with the same options and --resume --out {out}")
    return 0 if finished else interrupt.INTERRUPTED


def _show(console: Console, log: Log, names: list[str], task: Task) -> None:
    if not names:
        return
    console.print(report.table(log, names, task))
    for entry in (entry for name in names for entry in log.of("sample", name)):
        console.print(Panel(Text(entry["text"]), title=entry["optimizer"], title_align="left"))
    out = log.path.parent
    show.save(report.plot_losses(log, names, task), out / "losses.png", console)
    show.save(report.plot_gradient_norms(log, names), out / "gradient_norms.png", console)
    for path in (*(out / f"sample_{name}.png" for name in names), log.path):
        if path.exists():
            show.wrote(console, path)
    if said := report.verdict(log, names, task):
        console.print(said, soft_wrap=True)
