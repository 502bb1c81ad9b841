"""How far the best learning rate moves with a model's size: a table and a picture a family."""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.sweep import transfer_search
from benchmarks.sweep.families import FAMILIES
from benchmarks.sweep.trial import Trial

__all__ = ["plot_losses", "table"]


def table(results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """In Markdown, one row an optimizer: for each family two numbers.

    The greatest of its best rates over the least, and its loss at the largest size.

    Args:
      results: as `transfer.json` holds them.
    """
    families = [name for name in FAMILIES if results.get(name)]
    sizes = {
        name: sorted({int(size) for own in results[name].values() for size in own})
        for name in families
    }
    heads = [f"{name.replace('_', ' ')} {own[0]} to {own[-1]}" for name, own in sizes.items()]
    rows = [["optimizer", *heads], ["---"] * (1 + len(families))]
    for optimizer in dict.fromkeys(key for name in families for key in results[name]):
        cells = [_cell(results[name].get(optimizer), sizes[name]) for name in families]
        rows.append([f"`{optimizer}`", *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(own: Mapping[str, Mapping[str, float]] | None, sizes: Sequence[int]) -> str:
    if not own:
        return "-"
    rates = [best["learning_rate"] for best in own.values()]
    last = max(map(int, own))
    text = f"{max(rates) / min(rates):.1f}, {own[str(last)]['loss']:.3g}"
    return text if last == sizes[-1] else f"{text} (to {last})"


def plot_losses(
    name: str,
    trials: Mapping[int, Sequence[Trial]],
    results: Mapping[str, Mapping[int, tuple[float, float, float]]],
) -> Figure:
    """The loss against the learning rate, one curve a size, side by side for each optimizer.

    Args:
      name: the family's.
      trials: by size, of all optimizers.
      results: by optimizer and size, what `transfer_search.best` says.

    Returns:
      A figure with one panel an optimizer.
    """
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.2 * columns, 0.6 + 3.2 * rows),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    colors = plt.colormaps["viridis"]([i / max(1, len(trials)) for i in range(len(trials))])
    losses = []
    for panel, (optimizer, found) in zip(axes.flat, results.items(), strict=False):
        for (size, own), color in zip(trials.items(), colors, strict=True):
            points = _curve([trial for trial in own if trial.optimizer == optimizer])
            if points:
                rates, values = zip(*points, strict=True)
                panel.plot(rates, values, ".-", color=color, label=str(size), linewidth=1.2)
                losses += [value for value in values if math.isfinite(value)]
            if size in found:
                panel.plot(*found[size][:2], "o", color=color, markersize=8)
        panel.set(title=optimizer, xscale="log", xlabel="peak learning rate")
        # Over less than a decade they would overlap.
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(results) :]:
        panel.set_axis_off()
    low, high = min(losses), sorted(losses)[int(0.85 * (len(losses) - 1))]
    # Every best rate shows.
    high = max(high, *(best[1] for found in results.values() for best in found.values()))
    margin = 0.05 * (high - low)
    axes[0, 0].set_ylim(low - margin, high + margin)
    for row in axes:
        row[0].set_ylabel("training loss, last tenth [nats]")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title=name.replace("_", "\n"))
    figure.suptitle(
        f"{FAMILIES[name].what}; large dots: the best rates; small: those tried; "
        "higher losses are cut off"
    )
    return figure


def _curve(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """The mean loss over the seeds at every learning rate; NaN where one diverged."""
    rates = sorted({trial.learning_rate for trial in trials})
    points = []
    for rate in rates:
        own = [transfer_search.final_loss(trial) for trial in trials if trial.learning_rate == rate]
        mean = sum(own) / len(own)
        points.append((rate, mean if math.isfinite(mean) else math.nan))
    return points
