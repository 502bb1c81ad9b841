"""Tunes every optimizer alike on every task, and says which did how well.

Each gets the same number of learning rates, half a decade apart, then further seeds at the best.
A sweep that was stopped goes on with --resume.
"""

import argparse
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from rich import box
from rich.table import Table

from benchmarks.arguments import add_several
from benchmarks.optimizers import COMPARED
from benchmarks.sweep import compare_search, session, verdicts
from benchmarks.sweep.figures import plot_rates
from benchmarks.sweep.jobs import Job
from benchmarks.sweep.summary import NEAR, Standing, standings
from benchmarks.tasks import TASKS, Task, load

__all__ = ["PRESETS", "RESULT", "add_arguments", "run"]

PRESETS = {
    "cpu": compare_search.Plan(rates=7, seeds=3, length=1.0, batch_size=1),
    "try": compare_search.Plan(rates=3, seeds=1, length=0.1, batch_size=1),
    "accelerator": compare_search.Plan(rates=9, seeds=5, length=10.0, batch_size=4),
}

# All but a run that takes minutes each time.
SWEPT = tuple(name for name in TASKS if name != "finetune")
# What a sweep that goes on must have in common with its beginning.
FIXED = ("data_sha256", "steps", "batch_size", "plan", "target")

# What `compare.json` holds of a task.
RESULT = {"metric": str, "higher_is_better": bool, "target": float, "standings": list[Standing]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_several(parser, "--task", "a task to compare on", "all but finetune", choices=TASKS)
    add_several(parser, "--optimizer", "an optimizer to compare", "all", choices=COMPARED)
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="cpu: 7 learning rates and 3 seeds, four hours on two cores; try: 3 and 1 and a "
        "tenth of the steps, to see it work; accelerator: 9 and 5, ten times the steps and four "
        "times the batch (default: %(default)s)",
    )
    session.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Runs what is missing, writes, prints; returns the exit status."""
    tasks = {name: load(name) for name in dict.fromkeys(options.task or SWEPT)}
    plan = PRESETS[options.preset]
    abouts = {name: _about(name, task, plan) for name, task in tasks.items()}
    with session.opened("compare", options, abouts, FIXED, RESULT) as sweep:
        todo = []
        for name, optimizer in itertools.product(
            tasks, dict.fromkeys(options.optimizer or COMPARED)
        ):
            work = functools.partial(compare_search.work, name, optimizer, plan)
            done = session.trials(sweep.logs[name], optimizer=optimizer)
            job = Job(f"{optimizer} on {name}", work, done)
            todo.append(session.Todo(job, sweep.logs[name], plan.rates + plan.seeds))
        sweep.run(todo, options.workers)
        for name, task in tasks.items():
            trials = session.trials(sweep.logs[name])
            if trials:
                places = standings(trials, task)
                sweep.results[name] = _result(task, plan, places)
                sweep.console.print(_table(name, task, places))
                sweep.save(plot_rates(name, task, trials, places), f"{name}.png")
        sweep.write_results("compare.json")
        drawn = {name: result for name, result in sweep.results.items() if verdicts.judge(result)}
        if drawn:
            sweep.save(verdicts.plot_tasks(drawn), "compare.png")
            sweep.write("compare.md", verdicts.table(drawn))
        return sweep.status()


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
    """As `RESULT` says."""
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "target": task.target,
        "steps": plan.steps(task),
        "standings": [place._asdict() for place in places],
    }
