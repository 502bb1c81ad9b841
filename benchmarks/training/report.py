"""What people see of a training run: progress, a table, samples, and two figures."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import show
from benchmarks.runs import Log
from benchmarks.tasks import Task
from optax_unitscale import plot_norms

CAPTION = "rate: peak learning rate. final, best: of the validation split. test: final."


def progress(console: Console) -> Progress:
    """A live bar whose tasks carry the field `now`."""
    columns = TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn()
    now = TextColumn("{task.fields[now]}")
    return Progress(*columns, now, TimeRemainingColumn(), console=console)


def table(log: Log, names: list[str], task: Task) -> Table:
    """One row an optimizer: the metric, steps to the target, time."""
    best = np.nanmax if task.higher_is_better else np.nanmin
    rows = []
    for name in names:
        evaluations, (result,) = log.of("evaluation", name), log.of("result", name)
        values = [_float(e["value"]) for e in evaluations]
        reached = [e["step"] for e in evaluations if task.better(_float(e["value"]), task.target)]
        # The first step compiles.
        seconds = [e["seconds"] for e in log.of("step", name)[1:]]
        rows.append(
            [
                name,
                f"{log.of('run', name)[0]['learning_rate']:g}",
                f"{values[-1]:#.4g}",
                f"{best(values):#.4g}" if np.isfinite(values).any() else "-",
                f"{_float(result['test']):#.4g}",
                str(reached[0]) if reached else "never",
                f"{1000 * np.median(seconds):.1f}" if seconds else "-",
            ]
        )
    heads = ["optimizer", "rate", "final", "best", "test", f"steps to {task.target:g}", "ms/step"]
    return show.table(task.measure, heads, rows, CAPTION)


def verdict(log: Log, names: list[str], task: Task) -> str:
    """Who came first on the test split, by how much, in words; "" for one optimizer."""
    tests = {name: _float(log.of("result", name)[0]["test"]) for name in names}
    tests = {name: value for name, value in tests.items() if math.isfinite(value)}
    if len(tests) < 2:
        return ""
    first, second, *_ = sorted(tests, key=tests.__getitem__, reverse=task.higher_is_better)
    return (
        f"{first} came first on the test split: {tests[first]:.3g} against {tests[second]:.3g} of "
        f"{second}, the next ({task.metric})."
    )


def plot_losses(log: Log, names: list[str], task: Task) -> Figure:
    """Training loss and validation metric against the step, a line an optimizer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, style in show.styles(names).items():
        steps, evaluations = log.of("step", name), log.of("evaluation", name)
        losses = np.array([_float(e["loss"]) for e in steps])
        window = max(1, len(losses) // 40)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        left.plot(np.arange(window, len(losses) + 1), smooth, label=name, **style)
        at, values = [e["step"] for e in evaluations], [_float(e["value"]) for e in evaluations]
        right.plot(at, values, label=name, **style)
    right.axhline(task.target, color="grey", linestyle=":", linewidth=1)
    left.set(title="Training, running mean over 2.5 % of the steps", xlabel="step", ylabel="loss")
    right.set(title="Validation; dotted: the target", xlabel="step", ylabel=task.metric)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        show.name_ends(axes)
    figure.suptitle(f"{_title(log, names)}; {show.LEGEND}")
    return figure


def plot_gradient_norms(log: Log, names: list[str]) -> Figure:
    """Heat map of the gradient norm, layer by step, for each optimizer on one colour scale."""
    height = min(0.18 * len(_norms(log, names[0])[0]), 12)
    figure, panels = show.panels(len(names), 2, (6, height + 0.6), sharey=True)
    for panel, name in zip(panels, names, strict=True):
        plot_norms(_norms(log, name), axes=panel, colorbar=False).set_title(name, loc="left")
    limits = np.array([panel.images[0].get_clim() for panel in panels])
    for panel in panels:
        panel.images[0].set_clim(limits.min(), limits.max())
    label = "l2 norm of the gradient"
    figure.colorbar(panels[0].images[0], ax=panels, extend="both", label=label)
    figure.suptitle(_title(log, names))
    return figure


def _title(log: Log, names: list[str]) -> str:
    run = log.of("run", names[0])[0]
    return f"{run['task']}, {run['steps']} steps, seed {run['seed']}"


def _norms(log: Log, name: str) -> list[dict[str, float | None]]:
    return [entry["norms"] for entry in log.of("step", name)]


def _float(value: float | None) -> float:
    return math.nan if value is None else value
