"""A run's folder and the JSON in it."""

import datetime
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.arguments import UsageError

RUNS = pathlib.Path("runs")
Entry = dict[str, Any]


class Log:
    """The entries of a JSON Lines file: one object a line."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        # A process that was killed may have left half a line behind, always the last.
        *lines, half = path.read_text().split("\n") if path.exists() else [""]
        self.entries: list[Entry] = [json.loads(line) for line in lines]
        if half:
            self.keep(lambda _: True)

    def append(self, **entry: Any) -> None:
        """Adds an entry."""
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(_line(entry))

    def keep(self, wanted: Callable[[Entry], bool]) -> None:
        """Drops the entries that are not wanted."""
        self.entries = [entry for entry in self.entries if wanted(entry)]
        write(self.path, "".join(map(_line, self.entries)))

    def of(self, kind: str, optimizer: str) -> list[Entry]:
        """The entries of a kind, and of an optimizer."""
        return [e for e in self.entries if (e["kind"], e.get("optimizer")) == (kind, optimizer)]


def write(path: pathlib.Path, content: Any) -> None:
    """Writes a file that is whole or as it was, whenever the process ends: text, or JSON."""
    if not isinstance(content, str):
        text = json.dumps(content, indent=1, allow_nan=False)
        # What holds neither lists nor objects stands on one line.
        text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda x: " ".join(x[0].split()), text)
        content = f"{text}\n"
    whole = path.with_suffix(".new")
    whole.write_text(content)
    whole.replace(path)


def folder(
    command: str, out: pathlib.Path | None, resume: bool = False, holds: Sequence[str] = ()
) -> pathlib.Path:
    """The folder of --out, else with --resume the newest of the command, else a new one.

    What `holds` names lies in a folder in use, which only --resume goes on with.
    """
    if out is None and resume:
        out = max(RUNS.glob(f"{command}-*"), default=None)
    out = out or RUNS / f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"argument --out: cannot use {out}: {error}") from error
    if not resume and any(any(out.glob(part)) for part in holds):
        text = "holds a run; add --resume to go on with it, or name another folder"
        raise UsageError(f"argument --out: {out} {text}")
    return out


def check_same(path: pathlib.Path, saved: Entry, wanted: Entry) -> None:
    """Refuses to go on with what was started otherwise: a UsageError names the first difference."""
    for field, value in wanted.items():
        if saved.get(field) != value:
            raise UsageError(
                f"argument --resume: what {path} holds has {field} {saved.get(field)}, not "
                f"{value}; repeat its options or name another folder for --out"
            )


def number(value: Any) -> float | None:
    """Six digits; None for what is not finite, which JSON does not have."""
    return float(f"{float(value):.6g}") if math.isfinite(value) else None


def _line(entry: Entry) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
