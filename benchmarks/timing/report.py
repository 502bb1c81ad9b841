"""A run in tables, a part each, and a figure of the ratios."""

import itertools
from collections.abc import Callable, Iterator, Sequence

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.optimizers import is_ours
from benchmarks.show import color, panels, table
from benchmarks.timing.measurement import Row

CAPTION = (
    "Medians. Ratio: of times, to the first of the section, round by round. Compile: tracing too."
)
COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: f"{row['seconds']['median'] * 1e3:.4g}",
    "ratio": lambda row: f"{row['ratio']['median']:.3f}",
    "quartiles": lambda row: f"{row['ratio']['low']:.2f}-{row['ratio']['high']:.2f}",
    "tempor.\nMB": lambda row: f"{row.get('temporary_bytes', 0) / 1e6:.2f}",
    "compile\ns": lambda row: f"{_compiling(row):.2f}",
}


def tables(results: dict[str, list[Row]]) -> Iterator[Table]:
    """One for each GPT and dtype, and one for each other part."""
    for part, rows in results.items():
        for subject, found in itertools.groupby(rows, _subject):
            own = list(found)
            lines = [[_name(row), *(column(row) for column in COLUMNS.values())] for row in own]
            size = f"{own[0]['parameters'] / 1e6:.1f} M parameters"
            yield table(f"{part} {subject}: {size}", ["", *COLUMNS], lines, CAPTION)


def _name(row: Row) -> str:
    return f"{row['scope']}: {row['name'].removeprefix('optax.')}"


def _subject(row: Row) -> str:
    return f"{row['model']} {row.get('dtype', '')}" if "model" in row else f"{row['leaves']} leaves"


def plot_ratios(rows: Sequence[Row]) -> Figure:
    """The time of each contender of the part transformation over that of `unit_scale`."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    # Whole marks, and hollow ones.
    fills = dict(zip(dtypes, (color(""), "white"), strict=False))
    figure, grid = panels(2, 1, (8, 2.6), sharex=True)
    for axes, scope in zip(grid, ("leaf", "global"), strict=True):
        own = [row for row in rows if row["scope"] == scope]
        ours = {(x["model"], x["dtype"]): _seconds(x) for x in own if is_ours(x["name"])}
        name = next(row["name"] for row in own if is_ours(row["name"]))
        names = [x for x in dict.fromkeys(row["name"] for row in own) if x != name]
        for row in (row for row in own if row["name"] != name):
            ratio = _seconds(row) / ours[row["model"], row["dtype"]]
            height = names.index(row["name"]) + 0.3 * (dtypes.index(row["dtype"]) - 0.5)
            size = 5 + 3 * models.index(row["model"])
            style = {"color": color(row["name"]), "markersize": size}
            axes.plot(ratio, height, "o", markerfacecolor=fills[row["dtype"]], **style)
        axes.axvline(1, color=color(name), linewidth=2)
        axes.set_title(name, color=color(name))
        axes.set(xscale="log", xlabel=f"time over that of {name}; above 1, ours is faster")
        axes.set_yticks(range(len(names)), names, color=color(""))
        axes.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20], [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    for i, model in enumerate(models):
        style = {"color": color(""), "markersize": 5 + 3 * i}
        grid[-1].plot([], [], "o", label=f"{model} parameters", **style)
    for dtype, fill in fills.items():
        grid[-1].plot([], [], "o", color=color(""), markerfacecolor=fill, label=dtype)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def _seconds(row: Row) -> float:
    return row["seconds"]["median"]


def _compiling(row: Row) -> float:
    return row.get("trace_seconds", 0) + row.get("compile_seconds", 0)
