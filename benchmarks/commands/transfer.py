"""Finds the best learning rate at every size of a model, and says how far it moves.

The rate is found to within a factor of 1.4, with two seeds, for each optimizer and size. A sweep
that was stopped goes on with --resume.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import interrupt, machine, runs
from benchmarks.arguments import Parser, whole_number
from benchmarks.optimizers import CONTENDERS, ORTHOGONAL, TRANSFERRED
from benchmarks.runs import Log
from benchmarks.sweep import moves, session, transfer_search
from benchmarks.sweep.families import FAMILIES
from benchmarks.sweep.trial import Trial

__all__ = ["add_arguments", "run"]

# How many times the steps.
PRESETS = {"cpu": 1.0, "try": 0.2, "accelerator": 10.0}
FIXED = ("family", "length", "data_sha256")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    about = ", ".join(f"{name} ({family.what})" for name, family in FAMILIES.items())
    add(
        "--family",
        action="append",
        choices=tuple(FAMILIES),
        help=f"what differs; repeat it for several (default: all): {about}",
    )
    add(
        "--optimizer",
        action="append",
        choices=tuple(CONTENDERS),
        help=f"an optimizer to compare; repeat it for several (default: {', '.join(TRANSFERRED)})",
    )
    add(
        "--size",
        action="append",
        type=whole_number(1),
        metavar="N",
        help="one of a family's sizes; repeat it for several (default: all)",
    )
    add(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="cpu: about three hours on two cores; try: a fifth of the steps, but where they are "
        "the size, to see it work; accelerator: larger models and ten times the steps "
        "(default: %(default)s)",
    )
    session.add_arguments(parser)


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Runs what is missing, writes, prints; returns the exit status."""
    mpl.use("Agg")
    names = list(dict.fromkeys(options.family or FAMILIES))
    optimizers = list(dict.fromkeys(options.optimizer or TRANSFERRED))
    length = PRESETS[options.preset]
    sizes = _sizes(parser, options, names)
    names = list(sizes)
    out = runs.make_folder(
        parser, runs.choose_folder(parser, options, "transfer", ("*.jsonl",)), "transfer"
    )
    logs = {name: runs.open_log(parser, out / f"{name}.jsonl") for name in names}
    for name, log in logs.items():
        fingerprint = FAMILIES[name].member(sizes[name][0], length).task.fingerprint
        about = {"family": name, "length": length, "data_sha256": fingerprint}
        session.begin(parser, log, about | machine.about(*session.PACKAGES), FIXED)
    console = Console()
    console.print(f"writing to {out}", soft_wrap=True)
    todo = []
    for name in names:
        for size, optimizer in itertools.product(sizes[name], optimizers):
            if _is_too_slow(options, name, size, optimizer):
                console.print(f"left out on CPU but for --optimizer: {optimizer} on {name} {size}")
                continue
            done = session.trials(logs[name], size=size, optimizer=optimizer)
            # How many it takes shows on the way; one that is complete finds that out at once.
            job = transfer_search.Job(name, size, optimizer, length, done)
            todo.append((job, min(len(done), transfer_search.TRIALS - 1), transfer_search.TRIALS))

    def record(job: transfer_search.Job, trial: Trial) -> None:
        logs[job.family].append(kind="trial", size=job.size, **dataclasses.asdict(trial))

    with interrupt.deferred() as stop:
        session.run(console, options, transfer_search.work, todo, record, stop)
        results = {name: _results(log) for name, log in logs.items()}
        for name, found in results.items():
            if found:
                console.print(_table(name, found))
                trials = {
                    size: session.trials(logs[name], size=size)
                    for size in sorted({size for own in found.values() for size in own})
                }
                figure = moves.plot_losses(name, trials, found)
                figure.savefig(out / f"{name}.png", dpi=130)
                plt.close(figure)
                console.print(f"wrote {out / name}.png", soft_wrap=True)
        for path in _write(out, results):
            console.print(f"wrote {path}", soft_wrap=True)
    if stop.is_set():
        console.print(f"Stopped. Go on with the same options and --resume --out {out}")
        return interrupt.INTERRUPTED
    return 0


def _sizes(parser: Parser, options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The sizes of each family that were asked for; families without any are left out."""
    is_large = options.preset == "accelerator"
    every = {name: FAMILIES[name].large if is_large else FAMILIES[name].sizes for name in names}
    for size in options.size or ():
        if not any(size in sizes for sizes in every.values()):
            choices = "; ".join(f"{name}: {', '.join(map(str, x))}" for name, x in every.items())
            parser.error(f"argument --size: none has {size}, expected one of {choices}")
    wanted = {
        name: [size for size in sizes if size in (options.size or sizes)]
        for name, sizes in every.items()
    }
    return {name: sizes for name, sizes in wanted.items() if sizes}


def _is_too_slow(options: argparse.Namespace, name: str, size: int, optimizer: str) -> bool:
    """Whether a member takes hours, and nobody asked for this optimizer."""
    is_small = options.preset == "accelerator" or size <= FAMILIES[name].orthogonal
    return optimizer in ORTHOGONAL and not is_small and not options.optimizer


def _results(log: Log) -> dict[str, dict[int, Any]]:
    """By optimizer and size, what `transfer_search.best` says and what there is of it."""
    results: dict[str, dict[int, Any]] = {}
    sizes = sorted({entry["size"] for entry in log.entries if entry["kind"] == "trial"})
    optimizers = dict.fromkeys((*TRANSFERRED, *CONTENDERS))
    for optimizer, size in itertools.product(optimizers, sizes):
        best = transfer_search.best(session.trials(log, size=size, optimizer=optimizer))
        if best:
            results.setdefault(optimizer, {})[size] = best
    return results


def _table(name: str, results: dict[str, dict[int, Any]]) -> Table:
    """One row an optimizer: the best rate at every size, how far it moves, the loss it reaches."""
    sizes = sorted({size for found in results.values() for size in found})
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{name}: best learning rate by {FAMILIES[name].what}",
        caption="moves: the largest of these over the smallest. loss: the mean of two seeds at the "
        "largest size, and how far they are apart.",
    )
    table.add_column("optimizer", no_wrap=True)
    for heading in (*map(str, sizes), "moves", f"loss at {sizes[-1]}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for optimizer, found in results.items():
        rates = [rate for rate, _, _ in found.values()]
        last = found.get(sizes[-1])
        table.add_row(
            optimizer,
            *(f"{found[size][0]:.2g}" if size in found else "-" for size in sizes),
            f"{max(rates) / min(rates):.1f}",
            f"{last[1]:.3f} ±{last[2] / 2:.3f}" if last else "-",
        )
    return table


def _write(out: pathlib.Path, results: dict[str, Any]) -> list[pathlib.Path]:
    """The results, and those of other families that are there, as JSON and as a table."""
    path = out / "transfer.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    for name, found in results.items():
        content[name] = {
            optimizer: {
                str(size): dict(zip(("learning_rate", "loss", "range"), best, strict=True))
                for size, best in own.items()
            }
            for optimizer, own in found.items()
        }
    runs.write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    table = path.with_suffix(".md")
    runs.write(table, moves.table(content))
    return [path, table]
