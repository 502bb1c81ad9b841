"""What commands that sweep share: a folder of files that go on, processes, and progress."""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import interrupt, machine, runs
from benchmarks.arguments import UsageError, add_out, count
from benchmarks.runs import Log
from benchmarks.sweep import jobs
from benchmarks.sweep.trial import Trial

__all__ = ["Sweep", "Todo", "add_arguments", "opened", "trials"]


class Todo(NamedTuple):
    """A job, the log of its trials, about how many they are in all, and what else entries say."""

    job: jobs.Job
    log: Log
    total: int
    more: Mapping[str, Any] = {}


@dataclasses.dataclass
class Sweep:
    """A sweep that goes on in its folder.

    Attributes:
      out: the folder.
      logs: the trials, a file for each task.
      results: by task, what the folder's file of results holds.
      console: where to print.
      stop: set by Ctrl-C.
    """

    out: pathlib.Path
    logs: dict[str, Log]
    results: dict[str, Any]
    console: Console
    stop: threading.Event

    def run(self, todo: Sequence[Todo], workers: int | None) -> None:
        """Runs jobs, each in a process of its own, under a progress bar."""
        workers = workers or (machine.cores() if jax.default_backend() == "cpu" else 1)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        missing = [x for x in todo if len(x.job.done) < x.total]
        total = sum(x.total for x in todo)
        done = sum(min(len(x.job.done), x.total) for x in todo)
        with Progress(*columns, console=self.console, speed_estimate_period=600) as bar:
            row = bar.add_task("starting", total=total, completed=done)
            for index, trial in jobs.run([x.job for x in missing], workers, self.stop.is_set):
                job, log, _, more = missing[index]
                if trial:
                    log.append(kind="trial", **more, **dataclasses.asdict(trial))
                bar.update(row, advance=1 if trial else 0, description=job.title)

    def save(self, figure: Figure, name: str) -> None:
        """Writes a figure, closes it, and says so."""
        figure.savefig(self.out / name, dpi=130)
        plt.close(figure)
        self._say(name)

    def write(self, name: str, content: str) -> None:
        """Writes a file that is whole or as it was, and says so."""
        runs.write(self.out / name, content)
        self._say(name)

    def write_results(self, name: str) -> None:
        """Writes the file of results."""
        self.write(name, json.dumps(self.results, indent=1, allow_nan=False) + "\n")

    def status(self) -> int:
        """The command's exit status; says how to go on where Ctrl-C stopped it."""
        if not self.stop.is_set():
            return 0
        self.console.print(f"Stopped. Go on with the same options and --resume --out {self.out}")
        return interrupt.INTERRUPTED

    def _say(self, name: str) -> None:
        self.console.print(f"wrote {self.out / name}", soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --workers, --out and --resume."""
    parser.add_argument(
        "--workers",
        type=count(),
        metavar="N",
        help="processes at a time (default: one for each CPU core, one for other devices)",
    )
    add_out(parser, "results and figures", "sweep")


@contextlib.contextmanager
def opened(
    command: str,
    options: argparse.Namespace,
    abouts: Mapping[str, Mapping[str, Any]],
    fixed: Sequence[str],
    result: Any,
) -> Iterator[Sweep]:
    """Opens the folder of a sweep, all of whose files are read before any work.

    Args:
      command: its name, also that of the file of results.
      options: with --out and --resume.
      abouts: by task, the entry that opens its file.
      fixed: what a sweep that goes on must have in common with its beginning.
      result: what the file of results holds for each task, as `runs.fits` takes it.

    Yields:
      The sweep.
    """
    mpl.use("Agg")
    with contextlib.ExitStack() as held:
        folder = runs.folder(command, options.out, options.resume, ("*.jsonl",))
        out = held.enter_context(folder)
        logs = {name: Log(out / f"{name}.jsonl") for name in abouts}
        found = runs.read(out / f"{command}.json", result)
        for name, log in logs.items():
            for field in fixed if log.entries else ():
                saved = log.entries[0].get(field)
                if saved != abouts[name][field]:
                    raise UsageError(
                        f"argument --resume: the sweep in {log.path} has {field} {saved}, not "
                        f"{abouts[name][field]}; repeat its options or name another folder for "
                        "--out"
                    )
        for name, log in logs.items():
            # A process that was killed may have left half a line.
            log.keep(lambda entry: True)
            if not log.entries:
                packages = machine.about("jax", "jaxlib", "optax", "flax", "numpy")
                log.append(kind="sweep", **abouts[name], **packages)
        console = Console()
        console.print(f"writing to {out}", soft_wrap=True)
        stop = held.enter_context(interrupt.deferred())
        yield Sweep(out, logs, found, console, stop)


def trials(log: Log, **wanted: Any) -> list[Trial]:
    """The trials in a file, those whose entries have the values in `wanted`."""
    names = [field.name for field in dataclasses.fields(Trial)]
    return [
        Trial(**{name: entry[name] for name in names})
        for entry in log.entries
        if entry["kind"] == "trial" and all(entry.get(key) == x for key, x in wanted.items())
    ]
