"""A run's folder, which one process holds at a time, and the files in it, which are validated."""

import contextlib
import datetime
import json
import pathlib
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import filelock

from benchmarks.arguments import UsageError

__all__ = ["Entry", "Log", "fits", "folder", "read", "write"]

RUNS = pathlib.Path("runs")
Entry = dict[str, Any]

# What the entries of each kind hold at least; None stands for what is no finite number.
_NUMBER = float | None
_SPLITS = {"train": _NUMBER, "validation": _NUMBER, "test": _NUMBER}
_STEP = {"optimizer": str, "step": int}
KINDS: dict[str, Mapping[str, Any]] = {
    "run": {"optimizer": str, "task": str, "steps": int, "seed": int, "learning_rate": float},
    "step": {**_STEP, "loss": _NUMBER, "seconds": float, "norms": dict[str, _NUMBER]},
    "evaluation": {**_STEP, "value": _NUMBER},
    "result": {"optimizer": str, **_SPLITS},
    "sample": {"optimizer": str, "text": str},
    "sweep": {},
    "trial": {
        "optimizer": str,
        "learning_rate": float,
        "seed": int,
        "losses": list[_NUMBER],
        "curve": list[_NUMBER],
        "results": _SPLITS,
        "reached": int | None,
        "seconds": _NUMBER,
    },
}


class Log:
    """The entries of a JSON Lines file: one object a line, each line whole or absent.

    Attributes:
      writes: whether changes reach the file. Of several processes one writes; the others keep the
        same entries in memory.

    Raises:
      UsageError: a line is no entry.
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
                kind = KINDS.get(entry["kind"]) if fits(entry, {"kind": str}) else None
                if kind is not None and fits(entry, kind):
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


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type; a mapping or annotated class says keys' types."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(x, arguments[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(x, arguments[1]) for x in value.values())
    if isinstance(hint, type) and not typing.get_type_hints(hint):
        return isinstance(value, (int, float) if hint is float else hint)
    keys = hint if isinstance(hint, Mapping) else typing.get_type_hints(hint)
    return isinstance(value, dict) and all(
        k in value and fits(value[k], h) for k, h in keys.items()
    )


def read(path: pathlib.Path, hint: Any) -> dict[str, Any]:
    """What an earlier run left in a JSON file by name, nothing where there is none.

    Raises:
      UsageError: a value is not what `hint` says, see `fits`.
    """
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and all(fits(value, hint) for value in content.values()):
            return content
    raise UsageError(
        f"argument --out: {path} is not what an earlier run wrote; restore or delete that file"
    )


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file that is whole or as it was, whenever the process ends."""
    whole = path.with_suffix(".new")
    whole.write_text(text)
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

    While it is held no other process gets it; the operating system frees it with the process.

    Args:
      command: its name.
      out: what --out says.
      resume: what --resume says.
      holds: patterns of what lies in a folder in use, which only --resume goes on with.
      lock: whether to hold the folder; one of several processes that share it does.

    Yields:
      The folder.

    Raises:
      UsageError: it is in use, or something cannot be written to it.
    """
    if out is None and resume:
        out = max(RUNS.glob(f"{command}-*"), default=None)
    new = RUNS / f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        while out is None:
            try:
                new.mkdir(parents=True)
                out = new
            except FileExistsError:
                # Another run began in the same second.
                new = new.with_name(f"{new.name}-2")
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"argument --out: cannot use {out or new}: {error}") from error
    with contextlib.ExitStack() as held:
        try:
            if lock:
                held.enter_context(filelock.FileLock(out / ".lock", timeout=0))
        except filelock.Timeout:
            raise UsageError(
                f"argument --out: another run is at work in {out}; wait for its end, or name "
                "another folder"
            ) from None
        if not resume and any(any(out.glob(part)) for part in holds):
            raise UsageError(
                f"argument --out: {out} holds a run; add --resume to go on with it, or name "
                "another folder"
            )
        try:
            yield out
        except OSError as error:
            raise UsageError(f"stopped: {error}; what {out} holds is whole") from error


def _line(entry: Entry) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
