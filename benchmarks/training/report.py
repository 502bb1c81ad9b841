"""What people see of a training run: progress, a table, samples, and two figures."""

import math
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from benchmarks.runs import Log
from benchmarks.tasks import Task
from optax_unitscale import norm_ratios, plot_norms

__all__ = ["plot_gradient_norms", "plot_losses", "progress", "samples", "table", "verdict"]


class _LossColumn(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        # The first step compiles for seconds before there is a loss; a finished run has none.
        if task.fields["loss"] is None:
            return Text("finished before" if task.finished else "compiling")
        return Text(f"loss {task.fields['loss']:.3f}")


def progress(console: Console, unit: str) -> Progress:
    """A live bar whose tasks carry the fields `loss` and `rate`, in `unit` per second."""
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        _LossColumn(),
        TextColumn(f"{{task.fields[rate]:,.0f}} {unit}/s"),
        TimeRemainingColumn(),
        console=console,
    )


def table(log: Log, names: list[str], task: Task) -> Table:
    """One row an optimizer: the metric, steps to the target, time, spread of the norms."""
    better = "higher" if task.higher_is_better else "lower"
    result = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{task.metric}, {better} is better",
        padding=(0, 1, 0, 0),
        caption="rate: peak learning rate. final, best: of the validation split. test: final, of "
        "the test split. max/med, min/med: the largest and the smallest gradient norm of a layer "
        "over the median layer's, typical step.",
    )
    result.add_column("optimizer", no_wrap=True)
    target = f"steps to {task.target:g}"
    for heading in ("rate", "final", "best", "test", target, "ms/step", "max/med", "min/med"):
        result.add_column(heading, justify="right")
    best = np.nanmax if task.higher_is_better else np.nanmin
    for name in names:
        evaluations, results = log.of("evaluation", name), log.of("result", name)
        values = [_float(e["value"]) for e in evaluations]
        reached = [e["step"] for e in evaluations if task.better(_float(e["value"]), task.target)]
        # The first step compiles.
        seconds = [e["seconds"] for e in log.of("step", name)[1:]]
        largest, smallest = _spread(log, name)
        result.add_row(
            name,
            f"{log.of('run', name)[0]['learning_rate']:g}",
            f"{values[-1]:#.4g}" if values else "-",
            f"{best(values):#.4g}" if np.isfinite(values).any() else "-",
            f"{_float(results[0]['test']):#.4g}" if results else "-",
            str(reached[0]) if reached else "never",
            f"{1000 * np.median(seconds):.1f}" if seconds else "-",
            f"{largest:.1f}",
            f"{smallest:.3f}",
        )
    return result


def samples(log: Log, names: list[str]) -> list[Panel]:
    """What each model made of the same unseen inputs."""
    texts = [(name, entry["text"]) for name in names for entry in log.of("sample", name)]
    return [Panel(Text(text), title=name, title_align="left") for name, text in texts]


def verdict(log: Log, names: list[str], task: Task) -> str:
    """Who came first on the test split, by how much, in words; "" before there are two results."""
    tests = {name: _float(e["test"]) for name in names for e in log.of("result", name)}
    tests = {name: value for name, value in tests.items() if math.isfinite(value)}
    if len(tests) < 2:
        return ""
    first, second, *_ = sorted(tests, key=tests.__getitem__, reverse=task.higher_is_better)
    return (
        f"{first} came first on the test split: {tests[first]:.3g} against {tests[second]:.3g} of "
        f"{second}, the next ({task.metric})."
    )


def plot_losses(log: Log, names: list[str], task: Task, path: pathlib.Path) -> None:
    """Training loss and validation metric against the step, one colour an optimizer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in names:
        steps, evaluations = log.of("step", name), log.of("evaluation", name)
        losses = np.array([_float(e["loss"]) for e in steps])
        window = max(1, len(losses) // 40)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        (line,) = left.plot(np.arange(window, len(losses) + 1), smooth, label=name, linewidth=1.5)
        right.plot(
            [e["step"] for e in evaluations],
            [_float(e["value"]) for e in evaluations],
            marker="o",
            markersize=3,
            color=line.get_color(),
            label=name,
        )
    right.axhline(task.target, color="grey", linestyle=":", label=f"target {task.target:g}")
    left.set(title="Training, running mean over 2.5 % of the steps")
    left.set(xlabel="step", ylabel="loss")
    right.set(title="Validation", xlabel="step", ylabel=task.metric)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(_title(log, names))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_gradient_norms(log: Log, names: list[str], path: pathlib.Path) -> None:
    """Heat map of the gradient norm, layer by step, for each optimizer on one colour scale."""
    columns = 2 if len(names) > 1 else 1
    rows = -(-len(names) // columns)
    height = min(0.18 * len(_norms(log, names[0])[0]), 12) * rows
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4 + 4 * columns, 1.2 + height),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    panels = axes.flat[: len(names)]
    for panel in axes.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, names, strict=True):
        plot_norms(_norms(log, name), axes=panel, colorbar=False).set_title(name, loc="left")
    limits = np.array([panel.images[0].get_clim() for panel in panels])
    for panel in panels:
        panel.images[0].set_clim(limits.min(), limits.max())
    label = "l2 norm of the gradient"
    figure.colorbar(panels[0].images[0], ax=axes, extend="both", label=label)
    figure.suptitle(_title(log, names))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _title(log: Log, names: list[str]) -> str:
    run = log.of("run", names[0])[0]
    return f"{run['task']}, {run['steps']} steps, seed {run['seed']}"


def _spread(log: Log, name: str) -> tuple[float, float]:
    # Steps without any layer of finite, nonzero norm have no spread.
    ratios = np.array(list(norm_ratios(_norms(log, name)).values()))
    ratios = ratios[:, np.any(ratios > 0, axis=0)]
    if not ratios.size:
        return math.nan, math.nan
    return (
        float(np.median(np.nanmax(ratios, axis=0))),
        float(np.median(np.nanmin(ratios, axis=0))),
    )


def _norms(log: Log, name: str) -> list[dict[str, float | None]]:
    return [entry["norms"] for entry in log.of("step", name)]


def _float(value: float | None) -> float:
    return math.nan if value is None else value
