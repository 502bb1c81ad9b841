"""What commands that sweep share: a folder of files that go on, processes, and progress."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import joblib
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from benchmarks import machine, runs, show
from benchmarks.arguments import add, add_out, count
from benchmarks.runs import Log
from benchmarks.sweep import jobs
from benchmarks.sweep.trial import Trial


class Todo(NamedTuple):
    """A job, the log of its trials, about how many they are in all, and what else entries say."""

    job: jobs.Job
    log: Log
    total: int
    more: Mapping[str, Any] = {}


class Sweep(NamedTuple):
    """A sweep's folder; by task the log of the trials, and what the file of results holds."""

    out: pathlib.Path
    logs: dict[str, Log]
    results: dict[str, Any]
    console: Console

    def run(self, todo: Sequence[Todo], workers: int | None) -> None:
        """Runs jobs, each in a process of its own, under a progress bar."""
        workers = workers or (joblib.cpu_count() if jax.default_backend() == "cpu" else 1)
        missing = [x for x in todo if len(x.job.done) < x.total]
        done = sum(min(len(x.job.done), x.total) for x in todo)
        columns = MofNCompleteColumn(), *Progress.get_default_columns()
        with Progress(*columns, console=self.console, speed_estimate_period=600) as bar:
            row = bar.add_task("starting", total=sum(x.total for x in todo), completed=done)
            for index, trial in jobs.run([x.job for x in missing], workers):
                job, log, _, more = missing[index]
                log.append(kind="trial", **more, **dataclasses.asdict(trial))
                bar.update(row, advance=1, description=job.title)

    def write(self, name: str, content: Any) -> None:
        """Writes a file that is whole or as it was, and says so."""
        runs.write(self.out / name, content)
        show.wrote(self.console, self.out / name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --workers, --out and --resume."""
    what = "processes at a time (default: one for each CPU core, one for other devices)"
    add(parser, "--workers N", what, count())
    add_out(parser, "results and figures", "sweep")


def opened(command: str, options: argparse.Namespace, abouts: Mapping[str, runs.Entry]) -> Sweep:
    """Opens the folder of a sweep.

    `abouts` are the entries that open the file of each task, which a sweep that goes on must have
    too.
    """
    out = runs.folder(command, options.out, options.resume, ("*.jsonl",))
    logs = {name: Log(out / f"{name}.jsonl") for name in abouts}
    for name, log in logs.items():
        if not log.entries:
            packages = machine.about("jax", "jaxlib", "optax", "flax", "numpy")
            log.append(kind="sweep", **abouts[name], **packages)
        runs.check_same(log.path, log.entries[0], abouts[name])
    path, console = out / f"{command}.json", Console()
    console.print(f"writing to {out}", soft_wrap=True)
    return Sweep(out, logs, json.loads(path.read_text()) if path.exists() else {}, console)


def trials(log: Log, **wanted: Any) -> list[Trial]:
    """The trials in a file, those whose entries have the values in `wanted`."""
    names = [field.name for field in dataclasses.fields(Trial)]
    return [
        Trial(**{name: entry[name] for name in names if name in entry})
        for entry in log.entries
        if entry["kind"] == "trial" and all(entry.get(key) == x for key, x in wanted.items())
    ]
