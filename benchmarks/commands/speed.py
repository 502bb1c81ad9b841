"""Times unit_scale and its alternatives beside what the machine's memory allows."""

import argparse
import json
import os
import pathlib
import re
import threading
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import interrupt, machine, runs
from benchmarks.arguments import add_out, count
from benchmarks.timing.figures import plot_growth, plot_ratios, plot_sizes
from benchmarks.timing.growth import LEAVES
from benchmarks.timing.jobs import DTYPES, PARTS, Job, plan
from benchmarks.timing.measurement import Row
from benchmarks.timing.tables import tables
from benchmarks.timing.trees import MODELS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--part",
        choices=PARTS,
        action="append",
        help="what to measure; repeat it for several (default: everything)",
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        action="append",
        help="how many parameters; repeat it for several (default: 1M, 35M and 124M)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help="of the gradients and parameters; repeat it for several (default: both)",
    )
    parser.add_argument(
        "--train",
        choices=MODELS,
        default="35M",
        help="the GPT whose training step is timed, in the first --dtype (default: %(default)s)",
    )
    parser.add_argument(
        "--most-leaves",
        type=count(LEAVES[0], LEAVES[-1]),
        default=1000,
        metavar="N",
        help="the most leaves to time; thousands take minutes (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=count(5),
        default=40,
        metavar="N",
        help="how often each contender is timed, in turn; training steps a quarter as often "
        "(default: %(default)s)",
    )
    add_out(parser, "speed.json and the figures")


def run(options: argparse.Namespace) -> int:
    """Measures, writes, prints; returns the exit status."""
    with runs.folder("speed", options.out) as out:
        return _run(options, out)


def _run(options: argparse.Namespace, out: pathlib.Path) -> int:
    console = Console()
    jobs = plan(
        list(dict.fromkeys(options.part or PARTS)),
        list(dict.fromkeys(options.model or ["1M", "35M", "124M"])),
        list(dict.fromkeys(options.dtype or DTYPES)),
        options.rounds,
        options.most_leaves,
        options.train,
    )
    about, results = _about(options), {}
    with interrupt.deferred() as stop:
        finished = _measure(jobs, about, results, out / "speed.json", console, stop)
    load, cores = about["load"], about["cores"]
    if load > 0.5:
        console.print(
            f"The machine was busy before the run (load {load} on {cores} cores): close other "
            "programs and run again."
        )
    for table in tables(results):
        console.print(table)
    for name in [*_plot(results, out), "speed.json"]:
        if (out / name).exists():
            console.print(f"wrote {out / name}", soft_wrap=True)
    return 0 if finished else interrupt.INTERRUPTED


def _measure(
    jobs: list[Job],
    about: dict[str, Any],
    results: dict[str, list[Row]],
    path: pathlib.Path,
    console: Console,
    stop: threading.Event,
) -> bool:
    """Fills `results` and, after each job, the file; whether to the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        task = progress.add_task("", total=sum(job.seconds for job in jobs))
        for job in jobs:
            progress.update(task, description=job.title)

            def advance(seconds: float = job.seconds / job.steps) -> None:
                progress.advance(task, seconds)
                if stop.is_set():
                    raise KeyboardInterrupt

            try:
                rows = job.measure(advance)
            except KeyboardInterrupt:
                return False
            results.setdefault(job.part, []).extend(rows)
            runs.write(path, _as_json({**about, "results": results}))
    return True


def _plot(results: dict[str, list[Row]], out: pathlib.Path) -> list[str]:
    """Draws what was measured; the names of the files."""
    mpl.use("Agg")
    names = []
    sizes = [row for part in ("transformation", "step") for row in results.get(part, [])]
    if sizes:
        plot_sizes(sizes, out / "speed.png")
        names.append("speed.png")
    if results.get("transformation"):
        plot_ratios(results["transformation"], out / "ratios.png")
        names.append("ratios.png")
    leaves, groups = (results.get(part, []) for part in ("leaves", "groups"))
    if leaves or groups:
        plot_growth(leaves, groups, out / "growth.png")
        names.append("growth.png")
    return names


def _about(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures are, and of what."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "torch")
    return {
        "question": "What does unit_scale cost beside the naive division, Optax, PyTorch, and what "
        "memory allows?",
        "command": _command(options),
        **machine.about(*packages),
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


def _command(options: argparse.Namespace) -> str:
    """The command line, but for --out."""
    words = ["python -m benchmarks speed"]
    for name in ("part", "model", "dtype"):
        words += [f"--{name} {value}" for value in getattr(options, name) or ()]
    words.append(f"--train {options.train} --most-leaves {options.most_leaves}")
    return " ".join([*words, f"--rounds {options.rounds}"])


def _as_json(content: dict[str, Any]) -> str:
    text = json.dumps(content, indent=2, allow_nan=False)
    # What fits on a line stands on one.
    return re.sub(r"[\[{][^\[\]{}]{,150}?[\]}]", lambda x: " ".join(x[0].split()), text) + "\n"
