"""Trains the same model on the same batches with each optimizer, and compares them."""

import argparse
import dataclasses
import datetime
import pathlib
import threading

import matplotlib as mpl
from rich.console import Console
from rich.progress import Progress

from benchmarks import interrupt, report, training
from benchmarks.arguments import Parser, positive_number, whole_number
from benchmarks.optimizers import OPTIMIZERS, default_learning_rate
from benchmarks.tasks import TASKS, Task, load

__all__ = ["add_arguments", "run"]

RUNS = pathlib.Path("runs")
# jax.random.key ignores the bits above.
LARGEST_SEED = 2**32 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add(
        "--task",
        choices=TASKS,
        default="language_modelling",
        help="what to learn (default: %(default)s)",
    )
    add(
        "--steps",
        type=whole_number(1),
        default=1200,
        metavar="N",
        help="training steps for each optimizer (default: %(default)s)",
    )
    add(
        "--optimizer",
        action="append",
        choices=tuple(OPTIMIZERS),
        help="an optimizer to train with; repeat it for several (default: all)",
    )
    rates = ", ".join(f"{name} {default_learning_rate(name):g}" for name in OPTIMIZERS)
    add(
        "--learning-rate",
        type=positive_number,
        metavar="RATE",
        help=f"peak learning rate of every optimizer (default: each one's best: {rates})",
    )
    add(
        "--seed",
        type=whole_number(0, LARGEST_SEED),
        default=0,
        metavar="N",
        help="decides weights, batches and samples (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="examples in a batch (default: the task's)",
    )
    add(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for metrics, figures and checkpoints (default: a new one under runs/)",
    )
    add(
        "--checkpoint-every",
        type=whole_number(1),
        default=200,
        metavar="N",
        help="steps between checkpoints (default: %(default)s)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on where the run in --out, or the newest under runs/, stopped",
    )


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Trains, writes, prints; returns the exit status."""
    console = Console()
    names = list(dict.fromkeys(options.optimizer or OPTIMIZERS))
    out = _folder(parser, options)
    task = load(options.task)
    configs = [
        training.Config(
            task=options.task,
            data_sha256=task.fingerprint,
            optimizer=name,
            learning_rate=options.learning_rate or default_learning_rate(name),
            steps=options.steps,
            batch_size=options.batch_size or task.batch_size,
            seed=options.seed,
        )
        for name in names
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = training.Log(out / "metrics.jsonl")
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: cannot use {out}: {error}")
    _check_same_run(parser, log, configs)
    console.print(f"{options.task}: {', '.join(names)}; writing to {out}", soft_wrap=True)
    with interrupt.deferred() as stop:
        with report.progress(console) as bar:
            for config in configs:
                if not stop.is_set():
                    _train(bar, config, task, log, out, options.checkpoint_every, stop)
        _show(console, log, names, task, out)
    if stop.is_set():
        console.print(f"Stopped. Go on with the same options and --resume --out {out}")
        return interrupt.INTERRUPTED
    return 0


def _train(
    bar: Progress,
    config: training.Config,
    task: Task,
    log: training.Log,
    out: pathlib.Path,
    checkpoint_every: int,
    stop: threading.Event,
) -> None:
    row = bar.add_task(config.optimizer, total=config.steps, loss=None, rate=0.0)
    tokens = config.batch_size * task.tokens
    folder = out / "checkpoints" / config.optimizer
    for step, loss in training.train(config, task, log, folder, checkpoint_every):
        rate = tokens * (bar.tasks[row].speed or 0.0)
        bar.update(row, completed=step, loss=loss, rate=rate)
        if stop.is_set():
            return
    bar.update(row, completed=config.steps)


def _show(
    console: Console, log: training.Log, names: list[str], task: Task, out: pathlib.Path
) -> None:
    started = [name for name in names if log.of("step", name)]
    if not started:
        return
    console.print(report.table(log, started, task))
    for panel in report.samples(log, started):
        console.print(panel)
    mpl.use("Agg")
    report.plot_losses(log, started, task, out / "losses.png")
    report.plot_gradient_norms(log, started, out / "gradient_norms.png")
    for name in ("losses.png", "gradient_norms.png", "metrics.jsonl"):
        console.print(f"wrote {out / name}", soft_wrap=True)


def _folder(parser: Parser, options: argparse.Namespace) -> pathlib.Path:
    if options.out is None:
        earlier = sorted(RUNS.glob("train-*"))
        if options.resume and earlier:
            return earlier[-1]
        return RUNS / f"train-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    parts = [options.out / name for name in ("metrics.jsonl", "checkpoints")]
    if any(part.exists() for part in parts) and not options.resume:
        parser.error(
            f"argument --out: {options.out} holds a run; add --resume to go on with it, or name "
            "another folder"
        )
    return options.out


def _check_same_run(parser: Parser, log: training.Log, configs: list[training.Config]) -> None:
    for config in configs:
        runs = log.of("run", config.optimizer)
        # Without its configuration a checkpoint could be any run's.
        if not runs and any((log.path.parent / "checkpoints" / config.optimizer).glob("*")):
            parser.error(
                f"argument --resume: {log.path} does not say which run the checkpoints of "
                f"{config.optimizer} belong to; restore that file or name another folder for --out"
            )
        for saved in runs:
            for field, value in dataclasses.asdict(config).items():
                if saved[field] != value:
                    parser.error(
                        f"argument --resume: the run in {log.path.parent} has {field} "
                        f"{saved[field]} for {config.optimizer}, not {value}; repeat its options"
                    )
