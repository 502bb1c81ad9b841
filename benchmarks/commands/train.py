"""Trains the same model on the same batches with each optimizer, and compares them."""

import argparse
import functools
import pathlib
import threading
from collections.abc import Callable, Iterator

import matplotlib as mpl
from rich.console import Console
from rich.progress import Progress

from benchmarks import data, interrupt, runs
from benchmarks.arguments import Parser, positive_number, whole_number
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
        type=whole_number(1),
        metavar="N",
        help="training steps for each optimizer (default: the task's)",
    )
    add(
        "--optimizer",
        action="append",
        choices=tuple(CONTENDERS),
        help=f"an optimizer to train with; repeat it for several (default: {', '.join(SHOWN)})",
    )
    add(
        "--learning-rate",
        type=positive_number,
        metavar="RATE",
        help="peak learning rate of every optimizer (default: the task's for each)",
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
    processes.add_arguments(parser)


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Trains, writes, prints; returns the exit status."""
    names = list(dict.fromkeys(options.optimizer or SHOWN))
    # Figures go to files; a desktop's windows would come between.
    mpl.use("Agg")
    try:
        task = load(options.task)
    except data.UnavailableError as error:
        parser.error(f"argument --task: {error}")
    batch_size = options.batch_size or task.batch_size
    processes.check_arguments(parser, options, batch_size)
    out = runs.choose_folder(parser, options, "train", ("metrics.jsonl", "checkpoints"))
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
        for name in names
    ]
    out = runs.make_folder(parser, out, "train")
    log = runs.open_log(parser, out / "metrics.jsonl")
    runs.check_same(parser, log, configs)
    same = (configs, options.mesh, options.checkpoint_every, log.entries)
    with processes.joined(parser, options, batch_size, same) as mesh:
        layout = Layout(mesh)
        log.writes = processes.is_first()
        console = Console(quiet=not log.writes)
        console.print(f"{options.task}: {', '.join(names)}; writing to {out}", soft_wrap=True)
        if options.resume and not log.entries:
            console.print("There is no run yet to resume; starting one.")
        train = functools.partial(
            loop.train, task=task, log=log, every=options.checkpoint_every, layout=layout
        )
        with interrupt.deferred() as stop:
            with report.progress(console, task.unit) as bar:
                finished = _train(bar, configs, task.tokens, train, out / "checkpoints", stop)
            if log.writes:
                _show(console, log, names, task, out)
    if not finished:
        console.print(f"Stopped. Go on with the same options and --resume --out {out}")
        return interrupt.INTERRUPTED
    return 0


def _train(
    bar: Progress,
    configs: list[loop.Config],
    tokens: int,
    train: Callable[..., Iterator[tuple[int, float]]],
    checkpoints: pathlib.Path,
    stop: threading.Event,
) -> bool:
    """Trains with one optimizer after the other; whether to the end."""
    moment = 0
    for config in configs:
        row = bar.add_task(config.optimizer, total=config.steps, loss=None, rate=0.0)
        for step, loss in train(config, checkpoints=checkpoints / config.optimizer):
            rate = config.batch_size * tokens * (bar.tasks[row].speed or 0.0)
            bar.update(row, completed=step, loss=loss, rate=rate)
            moment += 1
            if processes.stopped(stop, moment):
                return False
        bar.update(row, completed=config.steps)
    return True


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
