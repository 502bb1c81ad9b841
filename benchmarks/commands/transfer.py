"""Finds the best learning rate at every size of a model, and says how far it moves.

The rate is found to within a factor of 1.4, with two seeds, for each optimizer and size. A sweep
that was stopped goes on with --resume.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.arguments import UsageError, add_several, count
from benchmarks.optimizers import CONTENDERS, ORTHOGONAL, TRANSFERRED
from benchmarks.runs import Log
from benchmarks.sweep import moves, session, transfer_search
from benchmarks.sweep.families import FAMILIES
from benchmarks.sweep.jobs import Job
from benchmarks.sweep.transfer_search import Best

__all__ = ["add_arguments", "run"]

# How many times the steps.
PRESETS = {"cpu": 1.0, "try": 0.2, "accelerator": 10.0}
FIXED = ("family", "length", "data_sha256")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    about = ", ".join(f"{name} ({family.what})" for name, family in FAMILIES.items())
    add_several(parser, "--family", f"what differs, {about}", "all", choices=tuple(FAMILIES))
    what, default = "an optimizer to compare", ", ".join(TRANSFERRED)
    add_several(parser, "--optimizer", what, default, choices=tuple(CONTENDERS))
    what = "one of a family's sizes"
    add_several(parser, "--size", what, "all", type=count(), metavar="N")
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="cpu: about three hours on two cores; try: a fifth of the steps, but where they are "
        "the size, to see it work; accelerator: larger models and ten times the steps "
        "(default: %(default)s)",
    )
    session.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Runs what is missing, writes, prints; returns the exit status."""
    sizes, length = _sizes(options), PRESETS[options.preset]
    abouts = {name: _about(name, own[0], length) for name, own in sizes.items()}
    with session.opened("transfer", options, abouts, FIXED, dict[str, dict[str, Best]]) as sweep:
        sweep.run([*_todo(options, sizes, length, sweep)], options.workers)
        for name, log in sweep.logs.items():
            found = _results(log)
            if found:
                sweep.console.print(_table(name, found))
                tried = sorted({size for own in found.values() for size in own})
                trials = {size: session.trials(log, size=size) for size in tried}
                sweep.save(moves.plot_losses(name, trials, found), f"{name}.png")
            sweep.results[name] = {
                optimizer: {str(size): best._asdict() for size, best in own.items()}
                for optimizer, own in found.items()
            }
        sweep.write_results("transfer.json")
        sweep.write("transfer.md", moves.table(sweep.results))
        return sweep.status()


def _about(name: str, size: int, length: float) -> dict[str, Any]:
    """The entry that opens a family's file."""
    fingerprint = FAMILIES[name].member(size, length).task.fingerprint
    return {"family": name, "length": length, "data_sha256": fingerprint}


def _todo(
    options: argparse.Namespace,
    sizes: Mapping[str, Sequence[int]],
    length: float,
    sweep: session.Sweep,
) -> Iterator[session.Todo]:
    """What to run, but for what takes hours and nobody asked for."""
    optimizers = dict.fromkeys(options.optimizer or TRANSFERRED)
    for name, log in sweep.logs.items():
        for size, optimizer in itertools.product(sizes[name], optimizers):
            title = f"{optimizer} on {name} {size}"
            is_small = options.preset == "accelerator" or size <= FAMILIES[name].orthogonal
            if optimizer in ORTHOGONAL and not is_small and not options.optimizer:
                sweep.console.print(f"left out on CPU but for --optimizer: {title}")
                continue
            work = functools.partial(transfer_search.work, name, size, optimizer, length)
            done = session.trials(log, size=size, optimizer=optimizer)
            # How many it takes shows on the way; one that is complete finds that out at once.
            total = max(transfer_search.TRIALS, len(done) + 1)
            yield session.Todo(Job(title, work, done), log, total, {"size": size})


def _sizes(options: argparse.Namespace) -> dict[str, list[int]]:
    """The sizes of each family that were asked for; families without any are left out."""
    which = "large" if options.preset == "accelerator" else "sizes"
    every = {name: getattr(FAMILIES[name], which) for name in options.family or FAMILIES}
    for size in options.size or ():
        if not any(size in sizes for sizes in every.values()):
            choices = "; ".join(f"{name}: {', '.join(map(str, x))}" for name, x in every.items())
            raise UsageError(f"argument --size: none has {size}, expected one of {choices}")
    wanted = {
        name: [size for size in sizes if size in (options.size or sizes)]
        for name, sizes in every.items()
    }
    return {name: sizes for name, sizes in wanted.items() if sizes}


def _results(log: Log) -> dict[str, dict[int, Best]]:
    """By optimizer and size, what `transfer_search.best` says and what there is of it."""
    results: dict[str, dict[int, Best]] = {}
    sizes = sorted({entry["size"] for entry in log.entries if "size" in entry})
    optimizers = dict.fromkeys((*TRANSFERRED, *CONTENDERS))
    for optimizer, size in itertools.product(optimizers, sizes):
        best = transfer_search.best(session.trials(log, size=size, optimizer=optimizer))
        if best:
            results.setdefault(optimizer, {})[size] = best
    return results


def _table(name: str, results: dict[str, dict[int, Best]]) -> Table:
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
        rates = [best.learning_rate for best in found.values()]
        last = found.get(sizes[-1])
        table.add_row(
            optimizer,
            *(f"{found[size].learning_rate:.2g}" if size in found else "-" for size in sizes),
            f"{max(rates) / min(rates):.1f}",
            f"{last.loss:.3f} ±{last.range / 2:.3f}" if last else "-",
        )
    return table
