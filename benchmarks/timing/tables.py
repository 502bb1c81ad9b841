"""A run in tables, a part each."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.table import Table

from benchmarks.timing.measurement import Row

__all__ = ["tables"]

_Column = tuple[str, Callable[[Row], str]]


def _milliseconds(row: Row) -> str:
    return f"{row['seconds']['median'] * 1e3:.4g}" if "seconds" in row else "-"


def _median(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]['median']:.3f}" if key in row else "-"


def _spread(row: Row) -> str:
    return f"{row['ratio']['low']:.2f}-{row['ratio']['high']:.2f}" if "ratio" in row else "-"


def _megabytes(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / 1e6:.2f}" if row.get(key) is not None else "-"


def _compile(row: Row) -> str:
    if "stopped" in row:
        return "stopped"
    if "compile_seconds" not in row:
        return "-"
    return f"{row['trace_seconds'] + row['compile_seconds']:.2f}"


TIME: list[_Column] = [("ms", _milliseconds), ("ratio", _median("ratio")), ("quartiles", _spread)]
MOVED: list[_Column] = [("moved\nMB", _megabytes("bytes")), ("of\nceiling", _median("share"))]
MADE: list[_Column] = [("tempor.\nMB", _megabytes("temporary_bytes")), ("compile\ns", _compile)]
COLUMNS: dict[str, list[_Column]] = {
    "transformation": TIME + MOVED + MADE,
    "step": TIME + MOVED + MADE,
    "training": TIME + MADE,
    "eager": TIME,
    "leaves": TIME + MADE,
    "groups": TIME + MADE,
    "orthogonal": TIME + MADE,
}
# The keys of a row that together get a table, or a section of one.
SUBJECTS = {
    "transformation": ("model", "dtype"),
    "step": ("model", "dtype"),
    "training": ("model", "dtype"),
    "orthogonal": ("model",),
}
CAPTION = (
    "Medians. Ratio: of times, to the first of the section, round by round. Of ceiling: what "
    "memory takes for the bytes that must be moved, over the time. Compile: tracing too."
)


def tables(results: dict[str, list[Row]]) -> Iterator[Table]:
    """The tables of a run.

    Args:
      results: the rows of each part.

    Yields:
      One for each GPT and dtype, and one for each other part.
    """
    for part, rows in results.items():
        if part not in ("leaves", "groups"):
            subjects = dict.fromkeys(_subject(part, row) for row in rows)
            for subject in subjects:
                yield _table(part, subject, [r for r in rows if _subject(part, r) == subject])
        elif rows:
            yield _table(part, "", rows)


def _subject(part: str, row: Row) -> str:
    return " ".join(str(row[key]) for key in SUBJECTS.get(part, ()))


def _table(part: str, subject: str, rows: Sequence[Row]) -> Table:
    size = f"{rows[0]['parameters'] / 1e6:.1f} M parameters"
    if "tokens" in rows[0]:
        size += f", {rows[0]['tokens']} tokens a step"
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{part} {subject}: {size}".replace(" :", ":"),
    )
    stopped = dict.fromkeys(f"{r['name']}: {r['stopped']}" for r in rows if "stopped" in r)
    table.caption = "\n".join([CAPTION, *stopped])
    columns = COLUMNS[part]
    table.add_column("", overflow="fold", min_width=17)
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for key, own in itertools.groupby(rows, functools.partial(_section, part)):
        table.add_section()
        table.add_row(key, style="bold")
        for row in own:
            name = row["name"].removeprefix("optax.")
            table.add_row(f"  {name}", *[cell(row) for _, cell in columns])
    return table


def _section(part: str, row: Row) -> str:
    """What the first of is what the others are compared with."""
    if part == "leaves":
        return f"{row['leaves']} leaves, {row['scope']}"
    return f"{row['groups']} {row['scope']}" if part == "groups" else row["scope"]
