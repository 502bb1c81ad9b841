"""A run's folder: which one it is, and whether what it holds is the same run."""

import argparse
import dataclasses
import datetime
import pathlib

from benchmarks import training
from benchmarks.arguments import Parser

__all__ = ["check_same", "folder"]

RUNS = pathlib.Path("runs")


def folder(parser: Parser, options: argparse.Namespace) -> pathlib.Path:
    """The folder that --out and --resume ask for."""
    if options.out is None:
        earlier = sorted(RUNS.glob("train-*"))
        if options.resume and earlier:
            return earlier[-1]
        return RUNS / f"train-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    parts = [options.out / name for name in ("metrics.jsonl", "checkpoints")]
    if any(part.exists() for part in parts) and not options.resume:
        parser.error(
            f"argument --out: {options.out} holds a run; add --resume to go on with it, or name "
            "another folder"
        )
    return options.out


def check_same(parser: Parser, log: training.Log, configs: list[training.Config]) -> None:
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
