"""Finds the best learning rate at every size of a model, and says how far it moves.

The rate is found to within a factor of 1.4, with two seeds, for each optimizer and size.
--resume continues a sweep that was stopped.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from rich.markdown import Markdown

from benchmarks import show
from benchmarks.arguments import add
from benchmarks.optimizers import CONTENDERS, TRANSFERRED
from benchmarks.runs import Log
from benchmarks.sweep import session
from benchmarks.sweep.jobs import Job, Remember
from benchmarks.sweep.search import TRIALS, find, rate_of
from benchmarks.sweep.sizes import FAMILIES, Best, best, moves, plot_losses
from benchmarks.sweep.trial import Trials

# How many times the steps.
PRESETS = {"cpu": 1.0, "try": 0.2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    about = ", ".join(f"{name} ({family.what})" for name, family in FAMILIES.items())
    what = f"what varies, {about}"
    add(parser, "--family", what, several="all", choices=tuple(FAMILIES))
    what = "an optimizer to compare"
    add(parser, "--optimizer", what, several=", ".join(TRANSFERRED), choices=tuple(CONTENDERS))
    sizes = sorted({size for family in FAMILIES.values() for size in family.sizes})
    add(parser, "--size", "one of a family's sizes", int, several="all", choices=sizes)
    what = (
        "cpu: about three hours on two cores; try: a fifth of the steps (except where "
        "steps are what varies), as a quick check"
    )
    add(parser, "--preset", what, default="cpu", choices=tuple(PRESETS))
    session.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Runs what is missing, writes, prints."""
    sizes, length = _sizes(options), PRESETS[options.preset]
    abouts = {}
    for name, own in sizes.items():
        fingerprint = FAMILIES[name].member(own[0], length).task.fingerprint
        abouts[name] = {"family": name, "length": length, "data_sha256": fingerprint}
    sweep = session.opened("transfer", options, abouts)
    sweep.run([*_todo(options, sizes, length, sweep)], options.workers)
    for name, log in sweep.logs.items():
        if found := _found(log):
            tried = sorted({size for own in found.values() for size in own})
            trials = {size: session.trials(log, size=size) for size in tried}
            picture = plot_losses(name, trials, found)
            show.save(picture, sweep.out / f"{name}.png", sweep.console)
        sweep.results[name] = {
            optimizer: {str(size): best._asdict() for size, best in own.items()}
            for optimizer, own in found.items()
        }
    sweep.write("transfer.json", sweep.results)
    sweep.write("transfer.md", moves(sweep.results))
    sweep.console.print(Markdown(moves(sweep.results)))


def _sizes(options: argparse.Namespace) -> dict[str, list[int]]:
    """The sizes of each family that were asked for; families without any are left out."""
    wanted = {
        name: [size for size in FAMILIES[name].sizes if size in (options.size or [size])]
        for name in options.family or FAMILIES
    }
    return {name: sizes for name, sizes in wanted.items() if sizes}


def _todo(
    options: argparse.Namespace,
    sizes: Mapping[str, Sequence[int]],
    length: float,
    sweep: session.Sweep,
) -> Iterator[session.Todo]:
    """What to run."""
    optimizers = dict.fromkeys(options.optimizer or TRANSFERRED)
    for name, log in sweep.logs.items():
        for size, optimizer in itertools.product(sizes[name], optimizers):
            do = functools.partial(work, name, size, optimizer, length)
            done = session.trials(log, size=size, optimizer=optimizer)
            # How many it takes shows on the way; one that is complete finds that out at once.
            total = max(TRIALS, len(done) + 1)
            job = Job(f"{optimizer} on {name} {size}", do, done)
            yield session.Todo(job, log, total, {"size": size})


def _found(log: Log) -> dict[str, dict[int, Best]]:
    """By optimizer and size, what `best` says and what there is of it."""
    found: dict[str, dict[int, Best]] = {}
    sizes = sorted({entry["size"] for entry in log.entries if "size" in entry})
    optimizers = dict.fromkeys((*TRANSFERRED, *CONTENDERS))
    for optimizer, size in itertools.product(optimizers, sizes):
        if rate := best(session.trials(log, size=size, optimizer=optimizer)):
            found.setdefault(optimizer, {})[size] = rate
    return found


def work(family: str, size: int, optimizer: str, length: float, remember: Remember) -> None:
    """Runs all trials of one optimizer on one size of a family, `length` times the steps."""
    member = FAMILIES[family].member(size, length)
    trial = remember(Trials(member.task, optimizer, member.steps, member.batch_size))
    start = round(2 * math.log2(CONTENDERS[optimizer].rate))
    find(lambda index, seed: trial(rate_of(index), seed).loss, start)
