"""Times unit_scale and its alternatives against the memory bandwidth of the machine."""

import argparse
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from benchmarks import interrupt, machine, runs, show
from benchmarks.arguments import add, add_out, count
from benchmarks.timing import report
from benchmarks.timing.measurement import Row, measure, summarize
from benchmarks.timing.parts import DTYPES, LEAVES, PARTS, Job, plan
from benchmarks.timing.trees import MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    what = "dtype of the gradients and parameters"
    add(parser, "--part", "what to measure", several="everything", choices=PARTS)
    add(parser, "--model", "how many parameters", several="1M, 35M and 124M", choices=MODELS)
    add(parser, "--dtype", what, several="both", choices=DTYPES)
    what = "the GPT whose training step is timed, in the first --dtype"
    add(parser, "--train", what, default="35M", choices=MODELS)
    what, kind = "the most leaves to time; thousands take minutes", count(LEAVES[0], LEAVES[-1])
    add(parser, "--most-leaves N", what, kind, default=1000)
    what = "how often each contender is timed, in turn; training steps a quarter as often"
    add(parser, "--rounds N", what, count(5), default=40)
    add_out(parser, "speed.json and the figures")


def run(options: argparse.Namespace) -> int:
    """Measures, writes, prints; returns the exit status."""
    console = Console()
    about = _about(options)
    with runs.folder("speed", options.out) as out, interrupt.deferred() as stop:
        results: dict[str, list[Row]] = {}
        jobs = plan(
            options.part or PARTS,
            list(dict.fromkeys(options.model or ["1M", "35M", "124M"])),
            list(dict.fromkeys(options.dtype or DTYPES)),
            options.rounds,
            options.most_leaves,
            options.train,
        )
        try:
            with Progress(console=console) as bar:
                row = bar.add_task("", total=len(jobs))
                for job in jobs:
                    bar.update(row, description=job.title)
                    rows = _rows(job, stop)
                    results.setdefault(job.part, []).extend(rows)
                    runs.write(out / "speed.json", {**about, "results": results})
                    bar.advance(row)
        except KeyboardInterrupt:
            console.print("Stopped.")
        if about["load"] > 0.5:
            console.print(
                f"The machine was busy before the run (load {about['load']} on {about['cores']} "
                "cores): close other programs and run again."
            )
        _show(console, results, out)
        return interrupt.INTERRUPTED if stop.is_set() else 0


def _rows(job: Job, stop: threading.Event) -> Sequence[Row]:
    about, contenders = job.make()
    times = measure(contenders, job.rounds, stop)
    # Of parts without a dtype no row has bytes.
    size = about["parameters"] * jnp.dtype(about.get("dtype", "float32")).itemsize
    return [about | row for row in summarize(contenders, times, size)]


def _show(console: Console, results: dict[str, list[Row]], out: pathlib.Path) -> None:
    for table in report.tables(results):
        console.print(table)
    leaves, groups = (results.get(part, []) for part in ("leaves", "groups"))
    if sizes := results.get("transformation", []) + results.get("step", []):
        show.save(report.plot_sizes(sizes), out / "speed.png", console)
    if alone := results.get("transformation"):
        show.save(report.plot_ratios(alone), out / "ratios.png", console)
    if leaves or groups:
        show.save(report.plot_growth(leaves, groups), out / "growth.png", console)
    if results:
        show.wrote(console, out / "speed.json")


def _about(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures are, and of what."""
    words = ["python -m benchmarks speed"]
    for name in ("part", "model", "dtype"):
        words += [f"--{name} {value}" for value in getattr(options, name) or ()]
    words.append(f"--train {options.train} --most-leaves {options.most_leaves}")
    return {
        "question": "What does unit_scale cost beside the naive division, Optax, PyTorch, and what "
        "memory allows?",
        "command": " ".join([*words, f"--rounds {options.rounds}"]),
        **machine.about("jax", "jaxlib", "optax", "flax", "numpy", "torch"),
        "cores": machine.cores(),
        # Of the minute before: PyTorch's threads, above all, wait for cores that others use.
        "load": round(os.getloadavg()[0], 2),
        "rounds": options.rounds,
        "spread": "quartiles; ratio: to the scope's first contender in the same round",
        "bytes": "that must be moved, by `passes`: a read of the gradient for its norms and a copy "
        "(a read and a write) to scale it; in a step a triad (gradient and parameters in, "
        "parameters out) in place of the copy. share: seconds of the passes, each measured alone "
        "in the same round, over the contender's; above 1 where a leaf stays in a cache between "
        "its two reads.",
    }
