"""The command line: `python -m benchmarks train --help`."""

import argparse
import dataclasses
import datetime
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import matplotlib as mpl
from rich.console import Console

from benchmarks import report, training
from benchmarks.optimizers import OPTIMIZERS, default_learning_rate
from benchmarks.tasks import TASKS, Task, load

__all__ = ["main"]

RUNS = pathlib.Path("runs")
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Answers a wrong value with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    parser = Parser(prog="python -m benchmarks", description="Experiments with unit_scale.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a model with several optimizers"))
    options = parser.parse_args(arguments)
    return options.command(options)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = "Trains the same model on the same batches with each optimizer."
    add = parser.add_argument
    add("--task", choices=TASKS, default=TASKS[0], help="what to learn (default: %(default)s)")
    add(
        "--steps",
        type=_whole_number(1),
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
    add(
        "--learning-rate",
        type=_positive_number,
        metavar="RATE",
        help="peak learning rate of every optimizer (default: each one's best on language "
        "modelling)",
    )
    add(
        "--seed",
        type=_whole_number(0),
        default=0,
        metavar="N",
        help="decides weights, batches and samples (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=_whole_number(1),
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
        type=_whole_number(1),
        default=200,
        metavar="N",
        help="steps between checkpoints (default: %(default)s)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on where the run in --out, or the newest under runs/, stopped",
    )
    parser.set_defaults(command=lambda options: _train(parser, options))


def _train(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    console = Console()
    names = list(dict.fromkeys(options.optimizer or OPTIMIZERS))
    out = _folder(parser, options)
    task = load(options.task)
    configs = [
        training.Config(
            task=options.task,
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
    console.print(f"{options.task}: {', '.join(names)}; writing to {out}")
    interrupted = False
    try:
        with report.progress(console) as bar:
            for config in configs:
                _run(bar, config, task, log, out, options.checkpoint_every)
    except KeyboardInterrupt:
        interrupted = True
    _show(console, log, names, task, out)
    if interrupted:
        console.print(f"Stopped. Go on with the same options and --resume --out {out}")
        return INTERRUPTED
    return 0


def _run(bar, config, task, log, out, checkpoint_every) -> None:
    name = config.optimizer
    row = bar.add_task(name, total=config.steps, loss=math.nan, rate=0.0)
    tokens = config.batch_size * task.tokens
    folder = out / "checkpoints" / name
    for step, loss in training.train(config, task, log, folder, checkpoint_every):
        rate = tokens * (bar.tasks[row].speed or 0.0)
        bar.update(row, completed=step, loss=loss, rate=rate)
    bar.update(row, completed=config.steps)


def _show(console: Console, log: training.Log, names: list[str], task: Task, out: pathlib.Path):
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


def _folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> pathlib.Path:
    if options.out is None:
        earlier = sorted(RUNS.glob("train-*"))
        if options.resume and earlier:
            return earlier[-1]
        return RUNS / f"train-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if (options.out / "metrics.jsonl").exists() and not options.resume:
        parser.error(
            f"argument --out: {options.out} holds a run; add --resume to go on with it, or name "
            "another folder"
        )
    return options.out


def _check_same_run(
    parser: argparse.ArgumentParser, log: training.Log, configs: list[training.Config]
) -> None:
    for config in configs:
        for saved in log.of("run", config.optimizer):
            for field, value in dataclasses.asdict(config).items():
                if saved[field] != value:
                    parser.error(
                        f"argument --resume: the run in {log.path.parent} has {field} "
                        f"{saved[field]} for {config.optimizer}, not {value}; repeat its options"
                    )


def _whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of {least} or more, got {text!r}"
            )
        return int(text)

    return parse


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
