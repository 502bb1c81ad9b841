"""How results are shown: tables in a terminal and in Markdown, and figures of several panels."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    """For a terminal; numbers, all columns but the first, are flush right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, caption=caption)
    made.padding = 0, 1, 0, 0
    least = min(20, max(len(row[0]) for row in rows))
    made.add_column(heads[0], overflow="fold", min_width=least)
    for head in heads[1:]:
        made.add_column(head, justify="right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(
    heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 99, last: int = 0
) -> str:
    """A table; all columns but the first `left` and the last `last` are flush right."""
    right = range(left, len(heads) - last)
    rule = ["---:" if i in right else "---" for i in range(len(heads))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, rule, *rows))


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
    return figure, list(grid.flat[:count])


def save(figure: Figure, path: pathlib.Path, say: Console) -> None:
    """Writes a figure, closes it, and says so."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
    wrote(say, path)


def wrote(say: Console, path: pathlib.Path) -> None:
    """Says that a file was written, on one line however long."""
    say.print(f"wrote {path}", soft_wrap=True, markup=False)
