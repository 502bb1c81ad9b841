"""A run's folder, which one process holds at a time, and the files in it, which are validated."""

import contextlib
import datetime
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import filelock

from benchmarks.arguments import UsageError

RUNS = pathlib.Path("runs")
Entry = dict[str, Any]

# What the entries of each kind hold at least; None stands for what is no finite number.
_NUMBER = int | float | None
_STEP = {"optimizer": str, "step": int}
_TRIED = {"optimizer": str, "learning_rate": int | float, "seed": int}
_TRIAL = {**_TRIED, "losses": list, "curve": list, "results": dict}
KINDS: dict[str, Mapping[str, Any]] = {
    "run": {**_TRIED, "task": str, "steps": int},
    "step": {**_STEP, "loss": _NUMBER, "seconds": int | float, "norms": dict},
    "evaluation": {**_STEP, "value": _NUMBER},
    "result": {"optimizer": str, "train": _NUMBER, "validation": _NUMBER, "test": _NUMBER},
    "sample": {"optimizer": str, "text": str},
    "sweep": {},
    "trial": {**_TRIAL, "reached": int | None, "seconds": _NUMBER},
}


class Log:
    """The entries of a JSON Lines file: one object a line, each line whole or absent.

    Of several processes one `writes`; the others keep the same `entries` in memory. A line that is
    no entry raises a UsageError.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.writes = True
        self.entries: list[Entry] = []
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        # A process that was killed may have left half a line behind, always the last.
        for number, line in enumerate(lines[:-1], 1):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if fits(entry, {"kind": str}) and fits(entry, KINDS.get(entry["kind"])):
                    self.entries.append(entry)
            if len(self.entries) < number:
                raise UsageError(
                    f"argument --out: line {number} of {path} is no entry of a log; restore that "
                    "file or name another folder"
                )

    def append(self, **entry: Any) -> None:
        """Adds an entry and hands it to the operating system."""
        self.entries.append(entry)
        if self.writes:
            with self.path.open("a") as file:
                file.write(_line(entry))

    def keep(self, wanted: Callable[[Entry], bool]) -> None:
        """Drops the entries that are not wanted, and replaces the file in one move."""
        self.entries = [entry for entry in self.entries if wanted(entry)]
        if self.writes:
            write(self.path, "".join(map(_line, self.entries)))

    def of(self, kind: str, optimizer: str) -> list[Entry]:
        """The entries of a kind, and of an optimizer."""
        return [e for e in self.entries if (e["kind"], e.get("optimizer")) == (kind, optimizer)]


def fits(value: Any, types: Mapping[str, Any] | None) -> bool:
    """Whether a value from JSON has all these keys, with values of these types."""
    return (
        isinstance(value, dict)
        and types is not None
        and all(key in value and isinstance(value[key], own) for key, own in types.items())
    )


def read(path: pathlib.Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run left in a JSON file, by name, each with these types; {} without one."""
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and all(fits(value, types) for value in content.values()):
            return content
    raise UsageError(
        f"argument --out: {path} is not what an earlier run wrote; restore or delete that file"
    )


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


@contextlib.contextmanager
def folder(
    command: str,
    out: pathlib.Path | None,
    resume: bool = False,
    holds: Sequence[str] = (),
    *,
    lock: bool = True,
) -> Iterator[pathlib.Path]:
    """The folder of --out, else with --resume the newest of the command, else a new one.

    While it is held no other process gets it, unless `lock` is off, as for all but one of several
    processes that share it. What `holds` names lies in a folder in use, which only --resume goes on
    with. An OSError in the body becomes a UsageError.
    """
    if out is None and resume:
        out = max(RUNS.glob(f"{command}-*"), default=None)
    out = out or RUNS / f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    other = "or name another folder"
    with contextlib.ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if lock:
                held.enter_context(filelock.FileLock(out / ".lock", timeout=0))
        except filelock.Timeout:
            message = f"argument --out: another run is at work in {out}; wait for its end, {other}"
            raise UsageError(message) from None
        except OSError as error:
            raise UsageError(f"argument --out: cannot use {out}: {error}") from error
        if not resume and any(any(out.glob(part)) for part in holds):
            message = f"argument --out: {out} holds a run; add --resume to go on with it, {other}"
            raise UsageError(message)
        try:
            yield out
        except OSError as error:
            raise UsageError(f"stopped: {error}; what {out} holds is whole") from error


def _line(entry: Entry) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
