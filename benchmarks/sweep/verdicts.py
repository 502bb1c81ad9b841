"""What a sweep says of unit_scale, task by task, for the README: a table and a picture."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.optimizers import COMPARED, is_ours
from benchmarks.sweep.figures import STYLES

__all__ = ["Verdict", "judge", "plot_tasks", "table"]

PANELS = 4


class Verdict(NamedTuple):
    """The best optimizer with unit_scale against the best without, by the mean test metric.

    Attributes:
      ours: the standing of the one with it.
      other: the standing of the one without.
      outcome: "better" or "worse" where no seed of one is as good as any of the other, "level"
        where some are.
    """

    ours: Mapping[str, Any]
    other: Mapping[str, Any]
    outcome: str


def judge(result: Mapping[str, Any]) -> Verdict | None:
    """Compares the two; None where one side has no finished seeds.

    Args:
      result: of one task, as `compare.json` holds it.
    """
    sign = 1 if result["higher_is_better"] else -1
    finished = [place for place in result["standings"] if place["mean"] is not None]
    finished.sort(key=lambda place: -sign * place["mean"])
    ours = next((place for place in finished if is_ours(place["optimizer"])), None)
    other = next((place for place in finished if not is_ours(place["optimizer"])), None)
    if ours is None or other is None:
        return None
    here, there = ([sign * value for value in place["test"]] for place in (ours, other))
    outcome = "better" if min(here) > max(there) else "worse" if max(here) < min(there) else "level"
    return Verdict(ours, other, outcome)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown, one row a task; "decades" are of learning rate, `Standing.near`."""
    heads = ["task", "metric", "best with `unit_scale`", "best without", "it is", "SGD", "clipping"]
    rows = [[*heads, "decades: it, SGD, clipping"], ["---"] * (1 + len(heads))]
    for name, result in results.items():
        verdict = judge(result)
        if verdict is None:
            continue
        sides = (verdict.ours, verdict.other)
        places = {place["optimizer"]: place for place in result["standings"]}
        rivals = [places.get(rival) for rival in ("sgd", "clip")]
        better = "higher" if result["higher_is_better"] else "lower"
        rows.append(
            [
                name.replace("_", " "),
                f"{result['metric']}, {better} is better",
                *(f"`{place['optimizer']}` {_spread(place)}" for place in sides),
                verdict.outcome,
                *map(_spread, rivals),
                ", ".join(map(_decades, (verdict.ours, *rivals))),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot_tasks(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One panel a task, one row an optimizer: the seeds' test metrics and their mean."""
    lines = math.ceil(len(results) / PANELS)
    figure, grid = plt.subplots(
        lines,
        PANELS,
        figsize=(14, 1 + 3.2 * lines),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for panel in grid.flat[len(results) :]:
        panel.set_axis_off()
    for panel, (name, result) in zip(grid.flat, results.items(), strict=False):
        for place in result["standings"]:
            row, color = COMPARED.index(place["optimizer"]), STYLES[place["optimizer"]]["color"]
            if place["mean"] is not None:
                panel.plot(place["test"], [row] * len(place["test"]), "-", color=color, alpha=0.5)
                panel.plot(place["test"], [row] * len(place["test"]), "|", color=color)
                panel.plot(place["mean"], row, "o", color=color)
        panel.axvline(result["target"], color="grey", linestyle=":", linewidth=1)
        better = "higher" if result["higher_is_better"] else "lower"
        panel.set(title=name.replace("_", " "), xlabel=f"{result['metric']}, {better} is better")
        panel.grid(alpha=0.3)
    grid[0, 0].set_yticks(range(len(COMPARED)), COMPARED)
    grid[0, 0].invert_yaxis()
    figure.suptitle(
        "Test metric of further seeds at each one's best learning rate, and their mean; dotted: "
        "the target"
    )
    return figure


def _decades(place: Mapping[str, Any] | None) -> str:
    return f"{place['near']:.1f}" if place else "-"


def _spread(place: Mapping[str, Any] | None) -> str:
    if place is None:
        return "-"
    if place["mean"] is None:
        return "diverged"
    return f"{place['mean']:.3g} ({min(place['test']):.3g} to {max(place['test']):.3g})"
