"""Times unit_scale and its alternatives, and what the memory of the machine allows."""

import argparse
import os
from typing import Any

import joblib
from rich.console import Console
from rich.progress import Progress

from benchmarks import machine, runs, show
from benchmarks.arguments import add, add_out, count
from benchmarks.timing import report
from benchmarks.timing.measurement import Row, measure, summarize
from benchmarks.timing.parts import DTYPES, PARTS, plan
from benchmarks.timing.trees import MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    what = "dtype of the gradients and parameters"
    add(parser, "--part", "what to measure", several="everything", choices=PARTS)
    add(parser, "--model", "how many parameters", several="1M, 35M and 124M", choices=MODELS)
    add(parser, "--dtype", what, several="both", choices=DTYPES)
    what = "the GPT whose training step is timed, in the first --dtype"
    add(parser, "--train", what, default="35M", choices=MODELS)
    what = "how often each contender is timed, in turn; training steps a quarter as often"
    add(parser, "--rounds N", what, count(5), default=40)
    add_out(parser, "speed.json and the figure")


def run(options: argparse.Namespace) -> None:
    """Measures, writes, prints."""
    console, about = Console(), _about(options)
    out = runs.folder("speed", options.out)
    results: dict[str, list[Row]] = {}
    jobs = plan(
        options.part or PARTS,
        list(dict.fromkeys(options.model or ["1M", "35M", "124M"])),
        list(dict.fromkeys(options.dtype or DTYPES)),
        options.rounds,
        options.train,
    )
    with Progress(console=console) as bar:
        row = bar.add_task("", total=len(jobs))
        for job in jobs:
            bar.update(row, description=job.title)
            facts, contenders = job.make()
            rows = summarize(contenders, measure(contenders, job.rounds))
            results.setdefault(job.part, []).extend(facts | row for row in rows)
            runs.write(out / "speed.json", {**about, "results": results})
            bar.advance(row)
    if about["load"] > 0.5:
        console.print(f"The machine was busy before the run (load {about['load']}): run it again.")
    for table in report.tables(results):
        console.print(table)
    if alone := results.get("transformation"):
        show.save(report.plot_ratios(alone), out / "ratios.png", console)
    show.wrote(console, out / "speed.json")


def _about(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures are, and of what."""
    words = ["python -m benchmarks speed"]
    for name in ("part", "model", "dtype"):
        words += [f"--{name} {value}" for value in getattr(options, name) or ()]
    return {
        "question": "What does unit_scale cost beside the naive division, Optax, and what memory "
        "allows?",
        "command": " ".join([*words, f"--train {options.train} --rounds {options.rounds}"]),
        **machine.about("jax", "jaxlib", "optax", "flax", "numpy"),
        "cores": joblib.cpu_count(),
        # Of the minute before.
        "load": round(os.getloadavg()[0], 2),
        "rounds": options.rounds,
        "spread": "quartiles; ratio: to the scope's first contender in the same round",
    }
