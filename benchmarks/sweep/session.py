"""What commands that sweep share: a folder of files that go on, processes, and progress."""

import argparse
import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from benchmarks import interrupt, machine, runs, show
from benchmarks.arguments import UsageError, add, add_out, count
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
    """A sweep that goes on in its folder.

    By task it has the log of the trials, and what the folder's file of results holds. Ctrl-C sets
    `stop`.
    """

    out: pathlib.Path
    logs: dict[str, Log]
    results: dict[str, Any]
    console: Console
    stop: threading.Event

    def run(self, todo: Sequence[Todo], workers: int | None) -> None:
        """Runs jobs, each in a process of its own, under a progress bar."""
        workers = workers or (machine.cores() if jax.default_backend() == "cpu" else 1)
        missing = [x for x in todo if len(x.job.done) < x.total]
        done = sum(min(len(x.job.done), x.total) for x in todo)
        columns = MofNCompleteColumn(), *Progress.get_default_columns()
        with Progress(*columns, console=self.console, speed_estimate_period=600) as bar:
            row = bar.add_task("starting", total=sum(x.total for x in todo), completed=done)
            for index, trial in jobs.run([x.job for x in missing], workers, self.stop.is_set):
                job, log, _, more = missing[index]
                log.append(kind="trial", **more, **dataclasses.asdict(trial))
                bar.update(row, advance=1, description=job.title)

    def write(self, name: str, content: Any) -> None:
        """Writes a file that is whole or as it was, and says so."""
        runs.write(self.out / name, content)
        show.wrote(self.console, self.out / name)

    def status(self) -> int:
        """The command's exit status; says how to go on where Ctrl-C stopped it."""
        if not self.stop.is_set():
            return 0
        self.console.print(f"Stopped. Go on with the same options and --resume --out {self.out}")
        return interrupt.INTERRUPTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --workers, --out and --resume."""
    what = "processes at a time (default: one for each CPU core, one for other devices)"
    add(parser, "--workers N", what, count())
    add_out(parser, "results and figures", "sweep")


@contextlib.contextmanager
def opened(
    command: str, options: argparse.Namespace, abouts: Mapping[str, runs.Entry], result: Any
) -> Iterator[Sweep]:
    """Opens the folder of a sweep, all of whose files are read before any work.

    `abouts` are the entries that open the file of each task, which a sweep that goes on must have
    too. `result` is what the file of results holds for each task, as `runs.fits` takes it.
    """
    with contextlib.ExitStack() as held:
        folder = runs.folder(command, options.out, options.resume, ("*.jsonl",))
        out = held.enter_context(folder)
        logs = {name: Log(out / f"{name}.jsonl") for name in abouts}
        found = runs.read(out / f"{command}.json", result)
        for name, log in logs.items():
            for field, value in abouts[name].items() if log.entries else ():
                if (saved := log.entries[0].get(field)) != value:
                    raise UsageError(
                        f"argument --resume: the sweep in {log.path} has {field} {saved}, not "
                        f"{value}; repeat its options or name another folder for --out"
                    )
        for name, log in logs.items():
            # A process that was killed may have left half a line.
            log.keep(lambda entry: True)
            if not log.entries:
                packages = machine.about("jax", "jaxlib", "optax", "flax", "numpy")
                log.append(kind="sweep", **abouts[name], **packages)
        console = Console()
        console.print(f"writing to {out}", soft_wrap=True)
        yield Sweep(out, logs, found, console, held.enter_context(interrupt.deferred()))


def trials(log: Log, **wanted: Any) -> list[Trial]:
    """The trials in a file, those whose entries have the values in `wanted`."""
    names = [field.name for field in dataclasses.fields(Trial)]
    return [
        Trial(**{name: entry[name] for name in names if name in entry})
        for entry in log.entries
        if entry["kind"] == "trial" and all(entry.get(key) == x for key, x in wanted.items())
    ]
