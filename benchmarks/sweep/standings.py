"""What `compare` says of each optimizer on a task, and of unit_scale: tables and pictures."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks import show
from benchmarks.optimizers import CONTENDERS, is_ours
from benchmarks.sweep.search import best, worth
from benchmarks.sweep.trial import Trial
from benchmarks.tasks import SPLITS, Task

# Of the best: a metric within this share of it counts as near.
NEAR = 0.1


class Standing(NamedTuple):
    """How one optimizer did on one task."""

    optimizer: str
    learning_rate: float  # The best of those tried, by the final validation metric with seed 0.
    decay: float | None  # The best of those tried at this rate, None for the default.
    test: list[float | None]  # The final test metric at that rate, of each further seed.
    mean: float | None  # Of these.
    gap: float | None  # The training metric minus the test metric, mean over the seeds.
    near: float  # How many decades of learning rate came within `NEAR` of the best of any.
    diverged: int  # How many of the learning rates tried diverged.


def standings(trials: Sequence[Trial], task: Task) -> list[Standing]:
    """One standing an optimizer that has a finished trial, the best test metric first."""
    tuning = {
        name: [trial for trial in trials if trial.optimizer == name and trial.seed == 0]
        for name in CONTENDERS
    }
    top = max((worth(t, task) for own in tuning.values() for t in own), default=-math.inf)
    result = [
        _standing(name, own, [t for t in trials if t.optimizer == name and t.seed], task, top)
        for name, own in tuning.items()
        if own
    ]
    sign = -1 if task.higher_is_better else 1
    return sorted(result, key=lambda x: math.inf if x.mean is None else sign * x.mean)


def _standing(
    name: str, tuning: Sequence[Trial], seeds: Sequence[Trial], task: Task, top: float
) -> Standing:
    found = best(tuning, task)
    seeds = [t for t in seeds if t.setting == found.setting]
    tuning = [t for t in tuning if t.decay is None]
    values = {split: [trial.results[split] for trial in seeds] for split in SPLITS}
    pairs = zip(values["train"], values["test"], strict=True)
    gaps = [x - y for x, y in pairs if x is not None and y is not None]
    near = [worth(trial, task) >= top - NEAR * abs(top) for trial in tuning if math.isfinite(top)]
    return Standing(
        optimizer=name,
        learning_rate=found.learning_rate,
        decay=found.decay,
        test=values["test"],
        mean=_mean(values["test"]),
        gap=_mean(gaps),
        # The rates are half a decade apart.
        near=0.5 * sum(near),
        diverged=sum(trial.diverged for trial in tuning),
    )


def _mean(values: Sequence[Any]) -> float | None:
    """None if there is none, or one that is no number."""
    return None if not values or None in values else statistics.fmean(values)


def plot_rates(
    name: str, task: Task, trials: Sequence[Trial], places: Sequence[Standing]
) -> Figure:
    """The final validation metric against the learning rate: a panel an optimizer, the best first.

    In each the lines of all others are grey.
    """
    lines = {}
    for place in places:
        own = [t for t in trials if (t.optimizer, t.seed, t.decay) == (place.optimizer, 0, None)]
        own.sort(key=lambda trial: trial.learning_rate)
        lines[place.optimizer] = (
            [trial.learning_rate for trial in own],
            [math.nan if trial.diverged else _value(trial) for trial in own],
        )
    figure, panels = show.panels(len(places), 4, (3, 2.2), sharex=True, sharey=True)
    for panel, place in zip(panels, places, strict=True):
        color = show.color(place.optimizer)
        for other in lines.values():
            panel.plot(*other, color="0.85", linewidth=1)
        rates, values = lines[place.optimizer]
        panel.plot(rates, values, "o-", color=color, markersize=4)
        lost = [rate for rate, value in zip(rates, values, strict=True) if math.isnan(value)]
        edge, at = 0.05 if task.higher_is_better else 0.95, panel.get_xaxis_transform()
        panel.plot(lost, [edge] * len(lost), "x", color=color, transform=at)
        panel.axhline(task.target, color="black", linestyle=":", linewidth=1)
        mean = "" if place.mean is None else f" {place.mean:.4g}"
        panel.set_title(f"{place.optimizer}{mean}", color=color)
        panel.set(xscale="log")
    finite = [value for _, values in lines.values() for value in values if math.isfinite(value)]
    if finite and not task.higher_is_better:
        # Far above, nothing is to be told apart.
        low, high = min(finite), float(np.quantile(finite, 0.9))
        panels[0].set_ylim(low - 0.05 * (high - low), high)
    figure.supxlabel("peak learning rate")
    figure.supylabel(f"validation {task.measure}")
    figure.suptitle(
        f"{name.replace('_', ' ')}: {show.LEGEND}; after the name, the test metric\n"
        "dotted: the target; x: diverged; grey: all others"
    )
    return figure


def _value(trial: Trial) -> float:
    value = trial.results["validation"]
    return math.nan if value is None else value


class Verdict(NamedTuple):
    """One optimizer against another by the mean test metric.

    `outcome` is "better" or "worse" where no seed of one is as good as any of the other, "level"
    where some are.
    """

    ours: Mapping[str, Any]
    other: Mapping[str, Any]
    outcome: str


def judge(
    result: Mapping[str, Any], ours: str = "unit_muon", other: str | None = None
) -> Verdict | None:
    """An optimizer against another, by default the best without unit scale, on one task.

    `result` is what `compare.json` holds of it. None where one of them has no finished seeds.
    """
    sign = 1 if result["higher_is_better"] else -1
    finished = [place for place in result["standings"] if place["mean"] is not None]
    finished.sort(key=lambda place: -sign * place["mean"])
    places = {place["optimizer"]: place for place in finished}
    rivals = [name for name in places if (name == other if other else not is_ours(name))]
    if ours not in places or not rivals:
        return None
    pair = places[ours], places[rivals[0]]
    here, there = ([sign * value for value in place["test"]] for place in pair)
    outcome = "better" if min(here) > max(there) else "worse" if max(here) < min(there) else "level"
    return Verdict(*pair, outcome)


def verdicts(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown, one row a task."""
    ours = {
        "unit_muon_untuned": "`unit_muon` at 0.03",
        "unit_muon": "rate tuned",
        "unit_muon_decay": "rate and decay tuned",
    }
    rows = []
    for name, result in results.items():
        judged = [judge(result, own) for own in ours]
        if found := [verdict for verdict in judged if verdict]:
            rival = f"`{found[0].other['optimizer']}` {_spread(found[0].other)}"
            cells = [f"{_spread(x.ours)}, {x.outcome}" if x else "-" for x in judged]
            rows.append([name.replace("_", " "), _measure(result), rival, *cells])
    return show.markdown(["task", "metric", "best without, tuned", *ours.values()], rows)


def means(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The mean test metric by optimizer and task."""
    found: dict[str, dict[str, str]] = {}
    for task, result in results.items():
        for place in result["standings"]:
            mean = "diverged" if place["mean"] is None else f"{place['mean']:.3g}"
            found.setdefault(place["optimizer"], {})[task] = mean
    return found


def mean_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown, one row an optimizer and one column a task."""
    found = means(results)
    names = sorted(found, key=lambda name: (is_ours(name), name))
    rows = [[f"`{name}`", *(found[name].get(task, "-") for task in results)] for name in names]
    return show.markdown(["optimizer", *(x.replace("_", " ") for x in results)], rows)


def plot_tasks(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One panel a task, one row an optimizer: the seeds' test metrics and their mean."""
    found = {place["optimizer"] for x in results.values() for place in x["standings"]}
    names = sorted(found, key=lambda name: (not is_ours(name), name))
    figure, panels = show.panels(len(results), 3, (3.6, 0.6 + 0.19 * len(names)), sharey=True)
    for panel, (name, result) in zip(panels, results.items(), strict=True):
        for place in result["standings"]:
            row, color = names.index(place["optimizer"]), show.color(place["optimizer"])
            if place["mean"] is not None:
                rows = [row] * len(place["test"])
                panel.plot(place["test"], rows, "|-", color=color, alpha=0.6)
                panel.plot(place["mean"], row, "o", color=color)
        panel.axvline(result["target"], color="black", linestyle=":", linewidth=1)
        panel.set(title=name.replace("_", " "), xlabel=_measure(result))
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for panel in panels:
        for label, name in zip(panel.get_yticklabels(), names, strict=False):
            label.set_color(show.color(name))
    figure.suptitle(
        f"{show.LEGEND}; ticks: test metric of further seeds at the best learning rate\n"
        "dots: their mean; dotted: the target"
    )
    return figure


def _measure(result: Mapping[str, Any]) -> str:
    better = "higher" if result["higher_is_better"] else "lower"
    return f"{result['metric']}, {better} is better"


def _spread(place: Mapping[str, Any]) -> str:
    return f"{place['mean']:.3g} ({min(place['test']):.3g} to {max(place['test']):.3g})"
