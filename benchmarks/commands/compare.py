"""Tunes every optimizer in the same way on every task, and compares them.

Each that is tuned gets the same number of learning rates, half a decade apart, some also weight
decays at the best rate. Further seeds run at the best setting.
--resume continues a sweep that was stopped.
"""

import argparse
import functools
import itertools
from typing import Any

from rich.markdown import Markdown

from benchmarks import show, tasks
from benchmarks.arguments import add
from benchmarks.optimizers import COMPARED, CONTENDERS
from benchmarks.sweep import session
from benchmarks.sweep.jobs import Job, Remember
from benchmarks.sweep.search import Plan, tune
from benchmarks.sweep.standings import (
    judge,
    mean_table,
    plot_rates,
    plot_tasks,
    standings,
    verdicts,
)
from benchmarks.sweep.trial import Trials
from benchmarks.tasks import TASKS, Task

PRESETS = {
    "cpu": Plan(rates=7, seeds=3, length=1.0),
    "try": Plan(rates=3, seeds=1, length=0.1),
}
# All but a run that takes minutes each time.
SWEPT = tuple(name for name in TASKS if name != "finetune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add(parser, "--task", "a task to compare on", several="all but finetune", choices=TASKS)
    add(parser, "--optimizer", "an optimizer to compare", several="all", choices=COMPARED)
    what = (
        "cpu: 7 learning rates and 3 seeds, four hours on two cores; try: 3 and 1 and a tenth of "
        "the steps, to see it work"
    )
    add(parser, "--preset", what, default="cpu", choices=tuple(PRESETS))
    session.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Runs what is missing, writes, prints."""
    loaded = {name: tasks.load(name) for name in dict.fromkeys(options.task or SWEPT)}
    plan = PRESETS[options.preset]
    abouts = {name: about(name, task, plan) for name, task in loaded.items()}
    sweep = session.opened("compare", options, abouts)
    todo = []
    optimizers = dict.fromkeys(options.optimizer or COMPARED)
    for name, optimizer in itertools.product(loaded, optimizers):
        log = sweep.logs[name]
        do = functools.partial(work, name, optimizer, plan)
        job = Job(f"{optimizer} on {name}", do, session.trials(log, optimizer=optimizer))
        contender = CONTENDERS[optimizer]
        total = (plan.rates if contender.tuned else 1) + len(contender.decays) + plan.seeds
        if contender.decays:  # Which may replace the best setting, whose seeds were run.
            total = max(total, len(job.done) + 1)
        todo.append(session.Todo(job, log, total))
    sweep.run(todo, options.workers)
    for name, task in loaded.items():
        trials = session.trials(sweep.logs[name])
        places = standings(trials, task)
        fields = ("metric", "higher_is_better", "target", "steps")
        said = {field: abouts[name][field] for field in fields}
        sweep.results[name] = {**said, "standings": [x._asdict() for x in places]}
        picture = plot_rates(name, task, trials, places)
        show.save(picture, sweep.out / f"{name}.png", sweep.console)
    sweep.write("compare.json", sweep.results)
    sweep.console.print(Markdown(mean_table(sweep.results)))
    show.save(plot_tasks(sweep.results), sweep.out / "compare.png", sweep.console)
    if any(map(judge, sweep.results.values())):
        sweep.write("compare.md", verdicts(sweep.results))


def about(name: str, task: Task, plan: Plan) -> dict[str, Any]:
    """The entry that opens a task's file."""
    return {
        "task": name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "target": task.target,
        "data_sha256": task.fingerprint,
        "steps": plan.steps(task),
        "batch_size": task.batch_size,
        "plan": plan._asdict(),
    }


def work(name: str, optimizer: str, plan: Plan, remember: Remember) -> None:
    """Runs all trials of one optimizer on one task, given their names."""
    task = tasks.load(name)
    trials = Trials(task, optimizer, plan.steps(task), task.batch_size)
    tune(remember(trials), task, CONTENDERS[optimizer], plan)
