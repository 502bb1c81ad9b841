"""Compiles unit_scale and Optax's methods for TPUs and GPUs, none of which has to be there."""

import argparse
import json
import pathlib
import platform
import re
from typing import Any

from rich import box, filesize
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from benchmarks import machine, runs
from benchmarks.arguments import add_out
from benchmarks.lowering import forecast
from benchmarks.lowering.topologies import TOPOLOGIES, is_installed
from benchmarks.lowering.updates import CONFIG, METHODS, measure

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--topology",
        choices=TOPOLOGIES,
        action="append",
        metavar="NAME",
        help=f"what to compile for: {'; '.join(TOPOLOGIES)}; repeat it for several (default: all)",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        action="append",
        metavar="NAME",
        help=f"what to compile: {'; '.join(METHODS)}; repeat it for several (default: all)",
    )
    add_out(parser, "lower.json and forecast.md")


def run(options: argparse.Namespace) -> int:
    """Compiles, writes, prints; returns the exit status."""
    console = Console()
    wanted = list(dict.fromkeys(options.topology or TOPOLOGIES))
    names = [name for name in wanted if is_installed(TOPOLOGIES[name])]
    methods = list(dict.fromkeys(options.method or METHODS))
    for name in wanted:
        if name not in names:
            console.print(
                f"{name}: left out, its compiler is not installed; "
                "on Linux x86-64: pip install '.[bench,aot]'",
                markup=False,
                soft_wrap=True,
            )
    if not names:
        return 1
    with runs.folder("lower", options.out) as out:
        return _run(console, names, methods, out)


def _run(console: Console, names: list[str], methods: list[str], out: pathlib.Path) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with Progress(*columns, console=console) as progress:
        for name in names:
            task = progress.add_task(name, total=len(methods))
            results[name] = {}
            for method in methods:
                results[name][method] = measure(name, method)
                progress.advance(task)
    shares = forecast.shares(results)
    runs.write(out / "lower.json", _as_json(results, shares))
    runs.write(out / "forecast.md", forecast.as_markdown(shares))
    for name, rows in results.items():
        console.print(_table(name, rows))
    for name in ("lower.json", "forecast.md"):
        console.print(f"wrote {out / name}", soft_wrap=True)
    return 0


def _as_json(results: dict[str, dict[str, dict[str, Any]]], shares: list[dict[str, Any]]) -> str:
    packages = ("jax", "jaxlib", "optax", "flax", "libtpu", "jax-cuda13-plugin")
    content = {
        "question": "What do the compilers for TPU and GPU make of it?",
        "command": "python -m benchmarks lower",
        "python": platform.python_version(),
        "versions": machine.versions(*packages),
        "model": vars(CONFIG),
        "units": "bytes of one device; reads of main memory for each element of the gradient",
        "results": results,
        "forecast": {"formula": forecast.FORMULA, "shares": shares},
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    # What fits on a line stands on one.
    return re.sub(r"\{[^{}]{,150}?\}", lambda x: " ".join(x[0].split()), text) + "\n"


def _table(topology: str, rows: dict[str, dict[str, Any]]) -> Table:
    first = next(iter(rows.values()))
    size = filesize.decimal(first["gradient_bytes"])
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{topology}: {first['leaves']} leaves, {size} a device",
        caption="Optax's names stand without optax. Received, temporaries: of one device. Reads: "
        "of main memory, for each element.",
    )
    for heading in ("", "collectives"):
        table.add_column(heading, overflow="fold")
    for heading in ("received", "tempo-\nraries", "reads", "compile\ns"):
        table.add_column(heading, justify="right")
    for method, row in rows.items():
        kinds = row["collectives"].items()
        table.add_row(
            method.removeprefix("optax."),
            "\n".join(f"{n} {kind.removeprefix('collective-')}" for kind, n in kinds) or "none",
            filesize.decimal(row["wire_bytes"]).replace("bytes", "B"),
            filesize.decimal(row["temporary_bytes"]).replace("bytes", "B"),
            f"{row['reads']:.2f}",
            f"{row['compile_seconds']:.1f}",
        )
    return table
