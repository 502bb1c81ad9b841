"""A run in figures: time against parameters, ratios, and what grows with leaves and groups."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.timing.measurement import Row

__all__ = ["plot_growth", "plot_ratios", "plot_sizes"]

OURS: dict[str, Any] = {"linewidth": 3, "zorder": 3}
MARKERS = "osv^DP*X"


def plot_sizes(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Time against parameters, log-log: a column a scope, a row a dtype, and the ceiling.

    Args:
      rows: of the parts transformation and step.
      path: the file to write.
    """
    scopes = list(dict.fromkeys(r["scope"] for r in rows if r["scope"] != "ceiling"))
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    figure, panels = plt.subplots(
        len(scopes),
        len(dtypes),
        figsize=(2 + 4.5 * len(dtypes), 1 + 3.4 * len(scopes)),
        layout="constrained",
        squeeze=False,
    )
    for line, scope in zip(panels, scopes, strict=True):
        for axes, dtype in zip(line, dtypes, strict=True):
            own = [r for r in rows if (r["scope"], r["dtype"]) == (scope, dtype)]
            if own:
                _lines(axes, own, "parameters", _seconds)
                _ceiling(axes, own)
            axes.set(title=f"{scope}, {dtype}", ylabel="seconds")
            axes.set(xscale="log", yscale="log", xlabel="parameters")
            _ticks(axes, {row["parameters"]: row["model"] for row in rows})
        # A run that was stopped may have measured one dtype only.
        handles, labels = max(
            (x.get_legend_handles_labels() for x in line), key=lambda x: len(x[0])
        )
        line[-1].legend(
            handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small"
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_ratios(rows: Sequence[Row], path: pathlib.Path) -> None:
    """The time of each contender over that of `unit_scale`, a column a scope.

    Args:
      rows: of the part transformation.
      path: the file to write.
    """
    scopes = [x for x in ("leaf", "global") if any(row["scope"] == x for row in rows)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = plt.subplots(
        1,
        len(scopes),
        figsize=(6.2 * len(scopes), 3.6),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for axes, scope in zip(panels.flat, scopes, strict=True):
        own = [row for row in rows if row["scope"] == scope]
        ours = {(x["model"], x["dtype"]): _seconds(x) for x in own if _is_ours(x["name"])}
        names = list(dict.fromkeys(row["name"] for row in own if not _is_ours(row["name"])))
        for row in own:
            if _is_ours(row["name"]):
                continue
            dtype, size = dtypes.index(row["dtype"]), models.index(row["model"])
            axes.plot(
                _seconds(row) / ours[row["model"], row["dtype"]],
                names.index(row["name"]) + 0.24 * (dtype - (len(dtypes) - 1) / 2),
                "o^"[dtype],
                color=f"C{dtype}",
                markersize=4 + 2.5 * size,
                alpha=0.7,
            )
        axes.axvline(1, color="black", linewidth=1)
        name = next(row["name"] for row in own if _is_ours(row["name"]))
        axes.set(xscale="log", xlabel=f"time over that of {name}\nabove 1, ours is faster")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20], [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    marks = [*((f"C{i}", "o^"[i], 6, dtype) for i, dtype in enumerate(dtypes))]
    marks += [("grey", "o", 4 + 2.5 * i, model) for i, model in enumerate(models)]
    for color, marker, size, label in marks:
        panels.flat[-1].plot([], [], marker, color=color, markersize=size, label=label)
    figure.legend(loc="outside lower center", ncols=len(marks), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_growth(leaves: Sequence[Row], groups: Sequence[Row], path: pathlib.Path) -> None:
    """Run and compile time against leaves, and run time against groups, log-log.

    Args:
      leaves: of the part of that name.
      groups: of the part of that name.
      path: the file to write.
    """
    panels: list[tuple[str, str, Sequence[Row], Callable[[Row], float]]] = []
    if leaves:
        panels += [
            ("run time", "leaves", leaves, _seconds),
            ("trace and compile", "leaves", leaves, _compile),
        ]
    if groups:
        panels.append(("run time", "groups", groups, _seconds))
    figure, drawn = plt.subplots(
        1,
        len(panels),
        figsize=(1 + 4.5 * len(panels), 5),
        layout="constrained",
        squeeze=False,
    )
    for axes, (what, key, rows, value) in zip(drawn.flat, panels, strict=True):
        measured = [row for row in rows if "seconds" in row]
        _lines(axes, measured, key, value)
        size = rows[0]["parameters"] / 1e6
        axes.set(title=f"{what}, {size:.1f} M parameters", xlabel=key, ylabel="seconds")
        axes.set(xscale="log", yscale="log")
        _ticks(axes, {row[key]: str(row[key]) for row in rows})
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(axes: Axes, rows: Sequence[Row], key: str, value: Callable[[Row], float]) -> None:
    """A line a contender, with the quartiles of its seconds as a band."""
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row[key])
        style = {"marker": MARKERS[i % 8], "markersize": 4} | (OURS if _is_ours(name) else {})
        at = [row[key] for row in own]
        (line,) = axes.plot(at, [value(row) for row in own], label=name, **style)
        if value is _seconds:
            low, high = ([row["seconds"][end] for row in own] for end in ("low", "high"))
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _is_ours(name: str) -> bool:
    return name.startswith("unit_scale")


def _ticks(axes: Axes, labels: dict[int, str]) -> None:
    axes.set_xticks(list(labels), list(labels.values()), rotation=45)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")


def _ceiling(axes: Axes, rows: Sequence[Row]) -> None:
    """What memory takes for the bytes of unit_scale."""
    ours = next(row["name"] for row in rows if _is_ours(row["name"]))
    own = sorted((row for row in rows if row["name"] == ours), key=lambda row: row["parameters"])
    at = np.array([row["parameters"] for row in own])
    least = np.array([row["share"]["median"] * row["seconds"]["median"] for row in own])
    label = f"ceiling: {' + '.join(own[0]['passes'])}"
    axes.plot(at, least, color="black", linestyle="--", marker="_", label=label, zorder=4)


def _seconds(row: Row) -> float:
    return row["seconds"]["median"]


def _compile(row: Row) -> float:
    return row["trace_seconds"] + row["compile_seconds"]
