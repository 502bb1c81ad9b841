"""A run in tables, a part each, and in figures: against size, ratios, and growth."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.optimizers import is_ours
from benchmarks.show import panels, table
from benchmarks.timing.measurement import Row

MARKERS = "osv^DP*X"
CAPTION = (
    "Medians. Ratio: of times, to the first of the section, round by round. Of ceiling: what "
    "memory takes for the bytes that must be moved, over the time. Compile: tracing too."
)
COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: f"{row['seconds']['median'] * 1e3:.4g}",
    "ratio": lambda row: f"{row['ratio']['median']:.3f}",
    "quartiles": lambda row: f"{row['ratio']['low']:.2f}-{row['ratio']['high']:.2f}",
    "moved\nMB": lambda row: f"{row['bytes'] / 1e6:.2f}",
    "of\nceiling": lambda row: f"{row['share']['median']:.3f}",
    "tempor.\nMB": lambda row: f"{row['temporary_bytes'] / 1e6:.2f}",
    "compile\ns": lambda row: f"{_compiling(row):.2f}",
}


def tables(results: dict[str, list[Row]]) -> Iterator[Table]:
    """One for each GPT and dtype, and one for each other part; with the columns that it has."""
    for part, rows in results.items():
        for subject, found in itertools.groupby(rows, _subject):
            own = list(found)
            used = {head: f for head, f in COLUMNS.items() if any(_cell(f, row) for row in own)}
            lines = [[_name(row), *(_cell(f, row) or "-" for f in used.values())] for row in own]
            size = f"{own[0]['parameters'] / 1e6:.1f} M parameters"
            yield table(f"{part} {subject}: {size}", ["", *used], lines, CAPTION)


def _name(row: Row) -> str:
    return f"{row.get('groups', '')} {row['scope']}: {row['name'].removeprefix('optax.')}".strip()


def _subject(row: Row) -> str:
    if "model" in row:
        return f"{row['model']} {row.get('dtype', '')}".strip()
    return f"{row['leaves']} leaves" if "leaves" in row else ""


def _cell(column: Callable[[Row], str], row: Row) -> str:
    try:
        return column(row)
    except KeyError:
        return ""


def plot_sizes(rows: Sequence[Row]) -> Figure:
    """Time of transformation and step against parameters: a row a scope, a column a dtype."""
    scopes = dict.fromkeys(r["scope"] for r in rows if r["scope"] != "ceiling")
    dtypes = dict.fromkeys(r["dtype"] for r in rows)
    figure, grid = panels(len(scopes) * len(dtypes), len(dtypes), (5, 3.4))
    for axes, (scope, dtype) in zip(grid, itertools.product(scopes, dtypes), strict=True):
        own = [r for r in rows if (r["scope"], r["dtype"]) == (scope, dtype)]
        if own:
            _lines(axes, own, "parameters", _seconds)
            # What memory takes for the bytes of unit_scale.
            ours = [row for row in own if is_ours(row["name"])]
            ours = sorted(
                (row for row in ours if row["name"] == ours[0]["name"]),
                key=lambda row: row["parameters"],
            )
            label = f"ceiling: {' + '.join(ours[0]['passes'])}"
            least = [row["share"]["median"] * _seconds(row) for row in ours]
            at = [row["parameters"] for row in ours]
            axes.plot(at, least, "--_", color="black", label=label, zorder=4)
            if dtype == rows[-1]["dtype"]:
                axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
        axes.set(title=f"{scope}, {dtype}", ylabel="seconds", xlabel="parameters")
        _ticks(axes, {row["parameters"]: row["model"] for row in rows})
    return figure


def plot_ratios(rows: Sequence[Row]) -> Figure:
    """The time of each contender of the part transformation over that of `unit_scale`."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, grid = panels(2, 2, (6.2, 3.2), sharex=True)
    for axes, scope in zip(grid, ("leaf", "global"), strict=True):
        own = [row for row in rows if row["scope"] == scope]
        ours = {(x["model"], x["dtype"]): _seconds(x) for x in own if is_ours(x["name"])}
        name = next(row["name"] for row in own if is_ours(row["name"]))
        names = [x for x in dict.fromkeys(row["name"] for row in own) if x != name]
        for row in (row for row in own if row["name"] != name):
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
        axes.set(xscale="log", xlabel=f"time over that of {name}\nabove 1, ours is faster")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20], [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    marks = [(f"C{i}", "o^"[i], 6.0, dtype) for i, dtype in enumerate(dtypes)]
    marks += [("grey", "o", 4 + 2.5 * i, model) for i, model in enumerate(models)]
    for color, marker, size, label in marks:
        grid[-1].plot([], [], marker, color=color, markersize=size, label=label)
    figure.legend(loc="outside lower center", ncols=len(marks), frameon=False)
    return figure


def plot_growth(leaves: Sequence[Row], groups: Sequence[Row]) -> Figure:
    """Run and compile time against leaves, and run time against groups, log-log."""
    drawn: list[tuple[str, str, Sequence[Row], Callable[[Row], float]]] = [
        ("run time", "leaves", leaves, _seconds),
        ("trace and compile", "leaves", leaves, _compiling),
        ("run time", "groups", groups, _seconds),
    ]
    drawn = [x for x in drawn if x[2]]
    figure, grid = panels(len(drawn), 3, (4.5, 4.4))
    for axes, (what, key, rows, value) in zip(grid, drawn, strict=True):
        _lines(axes, rows, key, value)
        size = rows[0]["parameters"] / 1e6
        axes.set(title=f"{what}, {size:.1f} M parameters", xlabel=key, ylabel="seconds")
        _ticks(axes, {row[key]: str(row[key]) for row in rows})
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize="small")
    return figure


def _lines(axes: Axes, rows: Sequence[Row], key: str, value: Callable[[Row], float]) -> None:
    """A line a contender, with the quartiles of its seconds as a band."""
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row[key])
        style: dict[str, Any] = {"marker": MARKERS[i % 8], "markersize": 4}
        style |= {"linewidth": 3, "zorder": 3} if is_ours(name) else {}
        at = [row[key] for row in own]
        (line,) = axes.plot(at, [value(row) for row in own], label=name, **style)
        if value is _seconds:
            low, high = ([row["seconds"][end] for row in own] for end in ("low", "high"))
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _ticks(axes: Axes, labels: dict[int, str]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(list(labels), list(labels.values()), rotation=45)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")


def _seconds(row: Row) -> float:
    return row["seconds"]["median"]


def _compiling(row: Row) -> float:
    return row["trace_seconds"] + row["compile_seconds"]
