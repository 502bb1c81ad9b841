"""A run's folder and log: which one, that it can be used, and whether it holds the same run."""

import argparse
import dataclasses
import datetime
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from benchmarks.arguments import Parser

__all__ = ["Entry", "Log", "check_same", "choose_folder", "make_folder", "open_log", "write"]

RUNS = pathlib.Path("runs")
Entry = dict[str, Any]


class Log:
    """The entries of a `metrics.jsonl`: one JSON object a line, each line whole or absent.

    Attributes:
      writes: whether changes reach the file. Of several processes one writes; the others keep the
        same entries in memory.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.writes = True
        text = path.read_text() if path.exists() else ""
        # A process that was killed may have left half a line behind, always the last.
        self.entries: list[Entry] = [json.loads(x) for x in text.split("\n")[:-1]]

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
        """The entries of a kind (run, step, evaluation, result, sample) and an optimizer."""
        return [e for e in self.entries if (e["kind"], e["optimizer"]) == (kind, optimizer)]


def make_folder(parser: Parser, out: pathlib.Path | None, command: str) -> pathlib.Path:
    """Makes the folder that --out names, or a new one under runs/, if it can be written to."""
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
    except (OSError, ValueError) as error:
        _cannot_use(parser, out or new, error)
    return out


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file that is whole or as it was, whenever the process ends."""
    whole = path.with_suffix(".new")
    whole.write_text(text)
    whole.replace(path)


def open_log(parser: Parser, path: pathlib.Path) -> Log:
    """A log in a run's folder."""
    try:
        return Log(path)
    except (OSError, ValueError) as error:
        _cannot_use(parser, path.parent, error)


def choose_folder(
    parser: Parser, options: argparse.Namespace, command: str, parts: Sequence[str]
) -> pathlib.Path | None:
    """The folder that --out and --resume ask for.

    Args:
      parser: answers what is wrong.
      options: the command's.
      command: its name.
      parts: patterns of what a folder holds that is in use.

    Returns:
      The folder; None for a new one.
    """
    if options.out is None:
        earlier = sorted(RUNS.glob(f"{command}-*"))
        return earlier[-1] if options.resume and earlier else None
    if any(any(options.out.glob(part)) for part in parts) and not options.resume:
        parser.error(
            f"argument --out: {options.out} holds a run; add --resume to go on with it, or name "
            "another folder"
        )
    return options.out


def check_same(parser: Parser, log: Log, configs: Sequence[Any]) -> None:
    """Refuses to go on with a run that was started otherwise, by one of `training.loop.Config`."""
    for config in configs:
        runs = log.of("run", config.optimizer)
        # Without its configuration a checkpoint could be any run's.
        if not runs and any((log.path.parent / "checkpoints" / config.optimizer).glob("*")):
            parser.error(
                f"argument --resume: {log.path} does not say which run the checkpoints of "
                f"{config.optimizer} belong to; restore that file or name another folder for --out"
            )
        for saved in runs:
            for field, value in dataclasses.asdict(config).items():
                if saved[field] != value:
                    parser.error(
                        f"argument --resume: the run in {log.path.parent} has {field} "
                        f"{saved[field]} for {config.optimizer}, not {value}; repeat its options"
                    )


def _cannot_use(parser: Parser, out: pathlib.Path, error: Exception) -> NoReturn:
    parser.error(f"argument --out: cannot use {out}: {error}")


def _line(entry: Entry) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
