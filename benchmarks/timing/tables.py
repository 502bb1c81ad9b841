"""A run in tables, a part each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.timing.measurement import Row

__all__ = ["tables"]

_Column = tuple[str, Callable[[Row], str]]


def _quartiles(row: Row, key: str) -> str:
    if key not in row:
        return "-"
    value = row[key]
    return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _milliseconds(row: Row) -> str:
    return f"{row['seconds']['median'] * 1e3:.4g}" if "seconds" in row else "stopped"


def _speed(row: Row) -> str:
    return f"{row['bytes'] / row['seconds']['median'] / 1e9:.1f}" if "bytes" in row else "-"


def _temporaries(row: Row) -> str:
    size = row.get("temporary_bytes")
    return "-" if size is None else f"{size / 1e6:.2f}"


def _compile(row: Row) -> str:
    if "stopped" in row:
        return row["stopped"]
    if "compile_seconds" not in row:
        return "-"
    return f"{row['trace_seconds'] + row['compile_seconds']:.2f}"


TIME: _Column = ("ms", _milliseconds)
RATIO: _Column = ("ratio", lambda row: _quartiles(row, "ratio"))
COMPILE: _Column = ("trace and\ncompile s", _compile)
MEMORY: list[_Column] = [
    ("MB", lambda row: f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "-"),
    ("GB/s", _speed),
    ("of ceiling", lambda row: _quartiles(row, "share")),
    ("tempo-\nraries MB", _temporaries),
]
COLUMNS: dict[str, list[_Column]] = {
    "transformation": [TIME, RATIO, *MEMORY, COMPILE],
    "step": [TIME, RATIO, *MEMORY, COMPILE],
    "training": [TIME, RATIO, ("tempo-\nraries MB", _temporaries), COMPILE],
    "eager": [TIME, RATIO],
    "leaves": [TIME, RATIO, COMPILE],
    "groups": [TIME, RATIO, COMPILE],
}
# What a part has a table, or a section, for each of.
SUBJECTS = {
    "transformation": ("model", "dtype"),
    "step": ("model", "dtype"),
    "training": ("model", "dtype"),
    "leaves": ("leaves",),
    "groups": ("groups",),
}
CAPTION = (
    "Median (quartiles). Ratio: time over that of the scope's first, round by round. Of ceiling: "
    "what memory takes for the same bytes, over the time."
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
        title=f"{part} {subject}: {size}".replace(" :", ":"),
        caption=CAPTION,
    )
    first = part if part in ("leaves", "groups") else "scope"
    columns = COLUMNS[part]
    table.add_column(first)
    table.add_column("", overflow="fold")
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    last: Any = None
    for row in rows:
        key = row[first]
        if last not in (None, key):
            table.add_section()
        cells = [cell(row) for _, cell in columns]
        table.add_row("" if key == last else str(key), row["name"], *cells)
        last = key
    return table
