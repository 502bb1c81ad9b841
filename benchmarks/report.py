"""What people see of a training run: progress, a table, samples, and two figures."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from benchmarks.tasks import Task
from benchmarks.training import Log

__all__ = ["plot_gradient_norms", "plot_losses", "progress", "samples", "table"]


def progress(console: Console) -> Progress:
    """A live bar whose tasks carry the fields `loss` and `rate`, in tokens per second."""
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f} nats"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


def table(log: Log, names: list[str], task: Task) -> Table:
    """One row an optimizer: the metric, steps to the target, seconds, spread of the norms."""
    result = Table(
        box=box.SIMPLE_HEAD,
        title=f"Validation, {task.metric}: lower is better",
        caption="rate: peak learning rate; spread: largest over smallest gradient norm of a layer,"
        " median over steps",
    )
    result.add_column("optimizer")
    for heading in ("rate", "final", "best", f"steps to {task.target:g}", "ms/step", "spread"):
        result.add_column(heading, justify="right")
    for name in names:
        steps, evaluations = log.of("step", name), log.of("evaluation", name)
        if not steps or not evaluations:
            continue
        values = [e["value"] for e in evaluations]
        reached = [e["step"] for e in evaluations if e["value"] <= task.target]
        # The first step compiles.
        seconds = np.median([e["seconds"] for e in steps[1:]]) if len(steps) > 1 else np.nan
        ratios = [max(norms) / min(norms) for norms in map(_nonzero_norms, steps) if norms]
        result.add_row(
            name,
            f"{log.of('run', name)[0]['learning_rate']:g}",
            f"{values[-1]:.3f}",
            f"{min(values):.3f}",
            str(reached[0]) if reached else "never",
            f"{1000 * seconds:.1f}",
            f"{np.median(ratios):.0f}" if ratios else "none finite",
        )
    return result


def samples(log: Log, names: list[str]) -> list[Panel]:
    """What each model made of the same unseen input."""
    texts = [(name, entry["text"]) for name in names for entry in log.of("sample", name)]
    return [Panel(Text(text), title=name, title_align="left") for name, text in texts]


def plot_losses(log: Log, names: list[str], task: Task, path: pathlib.Path) -> None:
    """Training loss and validation metric against the step, one colour an optimizer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in names:
        steps, evaluations = log.of("step", name), log.of("evaluation", name)
        losses = np.array([e["loss"] for e in steps])
        window = max(1, len(losses) // 40)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        (line,) = left.plot(np.arange(window, len(losses) + 1), smooth, label=name, linewidth=1.5)
        right.plot(
            [e["step"] for e in evaluations],
            [e["value"] for e in evaluations],
            marker="o",
            markersize=3,
            color=line.get_color(),
            label=name,
        )
    right.axhline(task.target, color="grey", linestyle=":", label=f"target {task.target:g}")
    left.set(title="Training, running mean", xlabel="step", ylabel="loss [nats per token]")
    right.set(title="Validation", xlabel="step", ylabel=task.metric)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_gradient_norms(log: Log, names: list[str], path: pathlib.Path) -> None:
    """Heat map of the gradient norm, layer by step, for each optimizer on one colour scale."""
    logs = {name: log.of("step", name) for name in names if log.of("step", name)}
    layers = list(next(iter(logs.values()))[0]["norms"])
    columns = 2 if len(logs) > 1 else 1
    rows = -(-len(logs) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4 + 4 * columns, 1.2 + 0.16 * len(layers) * rows),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    maps = {n: np.array([list(e["norms"].values()) for e in s]).T for n, s in logs.items()}
    seen = np.concatenate([m[np.isfinite(m) & (m > 0)] for m in maps.values()])
    low, high = np.quantile(seen, [0.005, 0.995]) if seen.size else (0.1, 1.0)
    scale = LogNorm(low, max(high, 1.01 * low))
    image = None
    for panel in axes.flat[len(maps) :]:
        panel.set_axis_off()
    for panel, (name, values) in zip(axes.flat, maps.items(), strict=False):
        shown = np.ma.masked_where(~np.isfinite(values) | (values <= 0), values)
        panel.set_facecolor("black")
        extent = (0.5, values.shape[1] + 0.5, len(layers) - 0.5, -0.5)
        image = panel.imshow(
            shown, norm=scale, aspect="auto", interpolation="nearest", extent=extent
        )
        panel.set(title=name, xlabel="step")
        panel.set_yticks(range(len(layers)), layers, fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=axes, label="l2 norm of the gradient (black: zero or not finite)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _nonzero_norms(entry: dict) -> list[float]:
    return [norm for norm in entry["norms"].values() if 0 < norm < float("inf")]
