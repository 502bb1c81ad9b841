"""Tunes every optimizer alike on every task, and says which did how well.

Each gets the same number of learning rates, half a decade apart, then further seeds at the best.
A sweep that was stopped goes on with --resume.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import data, interrupt, machine, runs
from benchmarks.arguments import Parser
from benchmarks.optimizers import COMPARED
from benchmarks.sweep import compare_search, session, verdicts
from benchmarks.sweep.figures import plot_rates
from benchmarks.sweep.summary import NEAR, Standing, standings
from benchmarks.sweep.trial import Trial
from benchmarks.tasks import TASKS, Task, load

__all__ = ["PRESETS", "add_arguments", "run"]

PRESETS = {
    "cpu": compare_search.Plan(rates=7, seeds=3, length=1.0, batch_size=1),
    "try": compare_search.Plan(rates=3, seeds=1, length=0.1, batch_size=1),
    "accelerator": compare_search.Plan(rates=9, seeds=5, length=10.0, batch_size=4),
}

# All but a run that takes minutes each time.
SWEPT = tuple(name for name in TASKS if name != "finetune")
# What a sweep that goes on must have in common with its beginning.
FIXED = ("data_sha256", "steps", "batch_size", "plan", "target")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add(
        "--task",
        action="append",
        choices=TASKS,
        help="a task to compare on; repeat it for several (default: all but finetune)",
    )
    add(
        "--optimizer",
        action="append",
        choices=COMPARED,
        help="an optimizer to compare; repeat it for several (default: all)",
    )
    add(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="cpu: 7 learning rates and 3 seeds, four hours on two cores; try: 3 and 1 and a "
        "tenth of the steps, to see it work; accelerator: 9 and 5, ten times the steps and four "
        "times the batch (default: %(default)s)",
    )
    session.add_arguments(parser)


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Runs what is missing, writes, prints; returns the exit status."""
    mpl.use("Agg")
    names = list(dict.fromkeys(options.task or SWEPT))
    contenders = list(dict.fromkeys(options.optimizer or COMPARED))
    plan = PRESETS[options.preset]
    out = runs.choose_folder(parser, options, "compare", ("*.jsonl",))
    try:
        tasks = {name: load(name) for name in names}
    except data.UnavailableError as error:
        parser.error(f"argument --task: {error}")
    out = runs.make_folder(parser, out, "compare")
    logs = {name: runs.open_log(parser, out / f"{name}.jsonl") for name in names}
    for name, log in logs.items():
        session.begin(parser, log, _about(name, tasks[name], plan), FIXED)
    console = Console()
    console.print(f"writing to {out}", soft_wrap=True)
    todo = []
    for name, optimizer in itertools.product(names, contenders):
        done = session.trials(logs[name], optimizer=optimizer)
        job = compare_search.Job(name, optimizer, plan, done)
        todo.append((job, len(done), plan.rates + plan.seeds))

    def record(job: compare_search.Job, trial: Trial) -> None:
        logs[job.task].append(kind="trial", **dataclasses.asdict(trial))

    with interrupt.deferred() as stop:
        session.run(console, options, compare_search.work, todo, record, stop)
        results = {}
        for name, task in tasks.items():
            trials = session.trials(logs[name])
            if trials:
                places = standings(trials, task)
                results[name] = _result(task, plan, places)
                console.print(_table(name, task, places))
                figure = plot_rates(name, task, trials, places)
                figure.savefig(out / f"{name}.png", dpi=130)
                plt.close(figure)
                console.print(f"wrote {out / name}.png", soft_wrap=True)
        for path in _write(out, results):
            console.print(f"wrote {path}", soft_wrap=True)
    if stop.is_set():
        console.print(f"Stopped. Go on with the same options and --resume --out {out}")
        return interrupt.INTERRUPTED
    return 0


def _about(name: str, task: Task, plan: compare_search.Plan) -> dict[str, Any]:
    """The entry that opens a task's file."""
    return {
        "task": name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "target": task.target,
        "data_sha256": task.fingerprint,
        "steps": plan.steps(task),
        "batch_size": task.batch_size * plan.batch_size,
        "plan": plan._asdict(),
        **machine.about(*session.PACKAGES),
    }


def _table(name: str, task: Task, places: Sequence[Standing]) -> Table:
    """One row an optimizer, the best first."""
    better = "higher" if task.higher_is_better else "lower"
    seconds = "CPU s" if jax.default_backend() == "cpu" else "s"
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{name}: {task.metric}, {better} is better",
        caption="rate: the best of those tried, * at the edge of them. test: mean over the seeds; "
        f"range: of them. steps to, {seconds}: median over the seeds, from evaluations at every "
        f"tenth of the run. near, own: decades of learning rate within {100 * NEAR:.0f} % of the "
        "best of all, of its own best. lost: learning rates that diverged. gap: training minus "
        "test.",
    )
    table.add_column("optimizer", no_wrap=True)
    steps = f"steps to\n{task.target:g}"
    for heading in ("rate", "test", "range", steps, seconds, "near", "own", "lost", "gap"):
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


def _result(task: Task, plan: compare_search.Plan, places: Sequence[Standing]) -> dict[str, Any]:
    """What `compare.json` holds of a task."""
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "target": task.target,
        "steps": plan.steps(task),
        "standings": [place._asdict() for place in places],
    }


def _write(out: pathlib.Path, results: dict[str, Any]) -> list[pathlib.Path]:
    """Adds results to those of other tasks, and draws all that have both sides to compare."""
    path = out / "compare.json"
    results = (json.loads(path.read_text()) if path.exists() else {}) | results
    runs.write(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    drawn = {name: result for name, result in results.items() if verdicts.judge(result)}
    if not drawn:
        return [path]
    figure = verdicts.plot_tasks(drawn)
    figure.savefig(out / "compare.png", dpi=130)
    plt.close(figure)
    runs.write(out / "compare.md", verdicts.table(drawn))
    return [path, out / "compare.png", out / "compare.md"]
