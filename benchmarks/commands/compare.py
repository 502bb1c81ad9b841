"""Tunes every optimizer alike on every task, and says which did how well.

Each gets the same number of learning rates, half a decade apart, then further seeds at the best.
A sweep that was stopped goes on with --resume.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import data, interrupt, runs
from benchmarks.arguments import Parser, whole_number
from benchmarks.optimizers import CONTENDERS
from benchmarks.sweep import jobs
from benchmarks.sweep.figures import plot_rates
from benchmarks.sweep.summary import NEAR, Standing, standings
from benchmarks.sweep.trial import Trial
from benchmarks.tasks import TASKS, Task, load
from benchmarks.training import Log

__all__ = ["PRESETS", "add_arguments", "run"]

PRESETS = {
    "cpu": jobs.Plan(rates=7, seeds=3, length=1.0, batch_size=1),
    "try": jobs.Plan(rates=3, seeds=1, length=0.1, batch_size=1),
    "accelerator": jobs.Plan(rates=9, seeds=5, length=10.0, batch_size=4),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add(
        "--task",
        action="append",
        choices=TASKS,
        help="a task to compare on; repeat it for several (default: all)",
    )
    add(
        "--optimizer",
        action="append",
        choices=tuple(CONTENDERS),
        help="an optimizer to compare; repeat it for several (default: all)",
    )
    add(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="cpu: 7 learning rates and 3 seeds, three hours on two cores; try: 3 and 1 and a tenth "
        "of the steps, to see it work; accelerator: 9 and 5, ten times the steps and four times "
        "the batch (default: %(default)s)",
    )
    add(
        "--workers",
        type=whole_number(1),
        metavar="N",
        help="processes at a time (default: one for each CPU core, one for other devices)",
    )
    add(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for results and figures (default: a new one under runs/)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on where the sweep in --out, or the newest under runs/, stopped",
    )


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Runs what is missing, writes, prints; returns the exit status."""
    mpl.use("Agg")
    names = list(dict.fromkeys(options.task or TASKS))
    contenders = list(dict.fromkeys(options.optimizer or CONTENDERS))
    plan = PRESETS[options.preset]
    out = runs.folder(parser, options, "compare", ("*.jsonl",))
    try:
        tasks = {name: load(name) for name in names}
    except data.UnavailableError as error:
        parser.error(f"argument --task: {error}")
    out = runs.make(parser, out, "compare")
    logs = {name: runs.open_log(parser, out / f"{name}.jsonl") for name in names}
    for name, log in logs.items():
        _open(parser, log, _about(name, tasks[name], plan))
    wanted = [
        jobs.Job(name, optimizer, _entries(logs[name], optimizer))
        for name in names
        for optimizer in contenders
    ]
    console = Console()
    console.print(f"writing to {out}", soft_wrap=True)
    workers = options.workers or (os.cpu_count() if jax.default_backend() == "cpu" else 1) or 1
    with interrupt.deferred() as stop:
        _run(console, wanted, plan, workers, logs, stop.is_set)
        places = {name: standings(_trials(logs[name]), tasks[name]) for name in names}
        for name, task in tasks.items():
            if places[name]:
                console.print(_table(name, task, places[name]))
                figure = plot_rates(name, task, _trials(logs[name]), places[name])
                figure.savefig(out / f"{name}.png", dpi=130)
                plt.close(figure)
                console.print(f"wrote {out / name}.png", soft_wrap=True)
        _write(out / "compare.json", places)
        console.print(f"wrote {out / 'compare.json'}", soft_wrap=True)
    if stop.is_set():
        console.print(f"Stopped. Go on with the same options and --resume --out {out}")
        return interrupt.INTERRUPTED
    return 0


def _run(
    console: Console,
    wanted: Sequence[jobs.Job],
    plan: jobs.Plan,
    workers: int,
    logs: dict[str, Log],
    stop: Any,
) -> None:
    each = plan.rates + plan.seeds
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        row = bar.add_task("starting", total=each * len(wanted))
        done = 0.0
        missing = []
        for job in wanted:
            done += min(len(job.done), each)
            if len(job.done) < each:
                missing.append(job)
        bar.update(row, completed=done)
        for news in jobs.run(missing, plan, workers, stop):
            done += news.share
            if news.trial:
                logs[news.task].append(kind="trial", **news.trial)
            bar.update(row, completed=round(done, 1), description=f"{news.task} {news.optimizer}")


def _about(name: str, task: Task, plan: jobs.Plan) -> dict[str, Any]:
    """The entry that opens a task's file."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "kind": "sweep",
        "task": name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "target": task.target,
        "data_sha256": task.fingerprint,
        "steps": max(1, round(task.sweep * plan.length)),
        "batch_size": task.batch_size * plan.batch_size,
        "plan": plan._asdict(),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _open(parser: Parser, log: Log, about: dict[str, Any]) -> None:
    """Begins a file, or refuses one whose trials were run otherwise."""
    # A process that was killed may have left half a line.
    log.keep(lambda entry: True)
    if not log.entries:
        log.append(**about)
    for field in ("data_sha256", "steps", "batch_size", "plan", "target"):
        saved = log.entries[0][field]
        if saved != about[field]:
            parser.error(
                f"argument --resume: the sweep in {log.path} has {field} {saved}, not "
                f"{about[field]}; repeat its options or name another folder for --out"
            )


def _entries(log: Log, optimizer: str) -> list[dict[str, Any]]:
    fields = {field.name for field in dataclasses.fields(Trial)}
    found = [e for e in log.entries if e["kind"] == "trial" and e["optimizer"] == optimizer]
    return [{key: entry[key] for key in fields} for entry in found]


def _trials(log: Log) -> list[Trial]:
    return [Trial(**entry) for name in CONTENDERS for entry in _entries(log, name)]


def _table(name: str, task: Task, places: Sequence[Standing]) -> Table:
    """One row an optimizer, the best first."""
    better = "higher" if task.higher_is_better else "lower"
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{name}: {task.metric}, {better} is better",
        caption="rate: the best of those tried, * at the edge of them. test: mean over the seeds; "
        "range: of them. steps to, s: median over the seeds, from evaluations at every tenth of "
        f"the run. near, own: decades of learning rate within {100 * NEAR:.0f} % of the best of "
        "all, of its own best. lost: learning rates that diverged. gap: training minus test.",
    )
    table.add_column("optimizer", no_wrap=True)
    steps = f"steps to\n{task.target:g}"
    for heading in ("rate", "test", "range", steps, "s", "near", "own", "lost", "gap"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place in places:
        values = [value for value in place.test if value is not None]
        table.add_row(
            place.optimizer,
            f"{place.learning_rate:g}{'*' if place.at_edge else ''}",
            _format(place.mean),
            f"{min(values):.4g}-{max(values):.4g}" if values else "-",
            "never" if place.steps is None else str(place.steps),
            _format(place.seconds, ".3g"),
            f"{place.near:.1f}",
            f"{place.near_own:.1f}",
            f"{place.diverged}/{place.tried}",
            _format(place.gap, ".3g"),
        )
    return table


def _format(value: float | None, how: str = ".4g") -> str:
    return "-" if value is None else format(value, how)


def _write(path: pathlib.Path, places: dict[str, list[Standing]]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= {name: [place._asdict() for place in own] for name, own in places.items()}
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    whole.replace(path)
