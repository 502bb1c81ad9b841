"""The picture of a task in a sweep: its metric against the learning rate."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.optimizers import COMPARED, is_ours
from benchmarks.sweep.summary import Standing
from benchmarks.sweep.trial import Trial
from benchmarks.tasks import Task

__all__ = ["STYLES", "plot_rates"]

# unit_scale's ways in warm colours and whole lines, the others cold and dashed.
_OURS = [name for name in COMPARED if is_ours(name)]
_OTHERS = [name for name in COMPARED if not is_ours(name)]
STYLES = {
    name: {"color": color, "linestyle": line, "marker": marker}
    for names, colors, last, line in ((_OURS, "autumn", 0.75, "-"), (_OTHERS, "winter", 0.9, "--"))
    for name, color, marker in zip(
        names, plt.colormaps[colors](np.linspace(0.0, last, len(names))), "osv^DPX*", strict=False
    )
}


def plot_rates(
    name: str, task: Task, trials: Sequence[Trial], places: Sequence[Standing]
) -> Figure:
    """The final validation metric against the learning rate, one line an optimizer.

    Args:
      name: the task's.
      task: the task.
      trials: all of the task.
      places: its standings, whose order the legend has.

    Returns:
      A figure with two panels, for learning rates mean something else to optimizers whose step
      they bound than to the others.
    """
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.6), layout="constrained", sharey=True)
    for panel, ours in zip(panels, (True, False), strict=True):
        for place in places:
            if is_ours(place.optimizer) != ours:
                continue
            own = sorted(
                (t for t in trials if t.optimizer == place.optimizer and t.seed == 0),
                key=lambda trial: trial.learning_rate,
            )
            values = [math.nan if t.diverged else _value(t) for t in own]
            label = place.optimizer + (f", {place.mean:.4g}" if place.mean is not None else "")
            rates = [t.learning_rate for t in own]
            (line,) = panel.plot(rates, values, label=label, **STYLES[place.optimizer])
            lost = [t.learning_rate for t in own if t.diverged]
            panel.plot(
                lost,
                [0.02 if task.higher_is_better else 0.98] * len(lost),
                "x",
                color=line.get_color(),
                transform=panel.get_xaxis_transform(),
            )
        panel.axhline(task.target, color="grey", linestyle=":", linewidth=1)
        panel.set(xscale="log", xlabel="peak learning rate")
        panel.grid(alpha=0.3)
        if any(is_ours(place.optimizer) == ours for place in places):
            panel.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.13),
                ncols=3,
                fontsize=9,
                title="optimizer, test metric",
                title_fontsize=9,
            )
    finite = [_value(t) for t in trials if not t.diverged and t.results["validation"] is not None]
    if finite and not task.higher_is_better:
        # Far above, nothing is to be told apart.
        low, high = min(finite), float(np.quantile(finite, 0.9))
        panels[0].set_ylim(low - 0.05 * (high - low), high)
    panels[0].set(ylabel=f"validation {task.metric}", title="with unit_scale")
    panels[1].set(title="without")
    better = "higher" if task.higher_is_better else "lower"
    figure.suptitle(f"{name}: {better} is better; dotted: the target; x: diverged")
    return figure


def _value(trial: Trial) -> float:
    value = trial.results["validation"]
    return math.nan if value is None else value
