"""How results are shown: tables in a terminal and in Markdown, and figures of several panels."""

import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.optimizers import is_ours

LEGEND = "red: unit scale; blue: without"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    """For a terminal; numbers, all columns but the first, are flush right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, caption=caption)
    made.padding = 0, 1, 0, 0
    least = min(22, max(len(row[0]) for row in rows))
    made.add_column(heads[0], overflow="fold", min_width=least)
    for head in heads[1:]:
        made.add_column(head, justify="right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows))


def panels(
    count: int, most: int, size: tuple[float, float], **more: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with as many panels of a size in inches, at most so many beside each other."""
    columns = min(most, count)
    rows = -(-count // columns)
    shape = size[0] * columns, 0.6 + size[1] * rows
    more |= {"figsize": shape, "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(rows, columns, **more)
    for spare in grid.flat[count:]:
        spare.set_axis_off()
    found = list(grid.flat[:count])
    for lowest in found[-columns:]:
        lowest.tick_params(labelbottom=True)
    return figure, found


def color(name: str) -> str:
    """Of whatever belongs to an optimizer, as `LEGEND` says."""
    return "tab:red" if is_ours(name) else "tab:blue"


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colours of lines, and dashes that tell those of one colour apart."""
    dashes = {ours: itertools.cycle(("-", "--", "-.", ":")) for ours in (True, False)}
    return {x: {"color": color(x), "linestyle": next(dashes[is_ours(x)])} for x in names}


def name_ends(axes: Axes) -> None:
    """Writes the labels of lines beside their right ends, apart from each other."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = {}
    for line in axes.lines:
        points = np.array(line.get_xydata())
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) and not str(line.get_label()).startswith("_"):
            ends[line] = points[-1]
    lines = sorted(ends, key=lambda line: ends[line][1])
    heights = np.array([to_axes.transform(ends[line])[1] for line in lines])
    steps = min(0.07, 1 / max(1, len(lines))) * np.arange(len(lines))
    apart = np.maximum.accumulate(heights - steps) + steps
    apart = np.minimum(apart, 1 - steps[::-1])
    for line, height in zip(lines, apart, strict=True):
        style = {"color": line.get_color(), "va": "center", "annotation_clip": False}
        arrow = {"arrowstyle": "-", "color": style["color"], "linewidth": 0.5, "relpos": (0, 0.5)}
        place = {"xytext": (1.04, height), "textcoords": "axes fraction", "arrowprops": arrow}
        axes.annotate(str(line.get_label()), ends[line], **place, **style)


def save(figure: Figure, path: pathlib.Path, say: Console) -> None:
    """Writes a figure, closes it, and says so."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
    wrote(say, path)


def wrote(say: Console, path: pathlib.Path) -> None:
    """Says that a file was written, on one line however long."""
    say.print(f"wrote {path}", soft_wrap=True, markup=False)
