"""A run's folder: which one it is, that it can be used, and whether it holds the same run."""

import argparse
import dataclasses
import datetime
import pathlib
import tempfile
from collections.abc import Sequence
from typing import NoReturn

from benchmarks.arguments import Parser
from benchmarks.training import loop

__all__ = ["check_same", "choose_folder", "make_folder", "open_log", "write"]

RUNS = pathlib.Path("runs")


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


def open_log(parser: Parser, path: pathlib.Path) -> loop.Log:
    """A log in a run's folder."""
    try:
        return loop.Log(path)
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


def check_same(parser: Parser, log: loop.Log, configs: list[loop.Config]) -> None:
    """Refuses to go on with a run that was started otherwise."""
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
