"""What commands that sweep share: their options, a file that goes on, progress with time left."""

import argparse
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.arguments import Parser, whole_number
from benchmarks.runs import Log
from benchmarks.sweep import jobs
from benchmarks.sweep.trial import Trial

__all__ = ["PACKAGES", "add_arguments", "begin", "run", "trials"]

# Whose versions a sweep notes.
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --workers, --out and --resume."""
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        metavar="N",
        help="processes at a time (default: one for each CPU core, one for other devices)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for results and figures (default: a new one under runs/)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where the sweep in --out, or the newest under runs/, stopped",
    )


def begin(parser: Parser, log: Log, about: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Begins a file with `about`, or refuses one whose `fields` are others."""
    # A process that was killed may have left half a line.
    log.keep(lambda entry: True)
    if not log.entries:
        log.append(kind="sweep", **about)
    for field in fields:
        saved = log.entries[0].get(field)
        if saved != about[field]:
            parser.error(
                f"argument --resume: the sweep in {log.path} has {field} {saved}, not "
                f"{about[field]}; repeat its options or name another folder for --out"
            )


def trials(log: Log, **wanted: Any) -> list[Trial]:
    """The trials in a file, those whose entries have the values in `wanted`."""
    names = [field.name for field in dataclasses.fields(Trial)]
    return [
        Trial(**{name: entry[name] for name in names})
        for entry in log.entries
        if entry["kind"] == "trial" and all(entry[key] == x for key, x in wanted.items())
    ]


def run(
    console: Console,
    options: argparse.Namespace,
    work: Callable[[Any, jobs.Tell], None],
    todo: Sequence[tuple[Any, int, int]],
    record: Callable[[Any, Trial], Any],
    stop: threading.Event,
) -> None:
    """Runs jobs, each in a process of its own, under a progress bar.

    Args:
      console: where the bar goes.
      options: the command's, with `workers`.
      work: runs one job, see `jobs.run`.
      todo: jobs, how many trials each has done before, and about how many it has in all.
      record: keeps a job's trial.
      stop: ends it early.
    """
    workers = options.workers or (machine.cores() if jax.default_backend() == "cpu" else 1)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    missing = [job for job, done, total in todo if done < total]
    finished = float(sum(min(done, total) for _, done, total in todo))
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        total = sum(total for _, _, total in todo)
        row = bar.add_task("starting", total=total, completed=int(finished))
        for news in jobs.run(work, missing, workers, stop.is_set):
            finished += news.share
            if news.trial:
                record(missing[news.job], news.trial)
            bar.update(row, completed=round(finished, 1), description=str(missing[news.job]))
