"""Compiles unit_scale and Optax's methods for TPUs and GPUs that this machine need not have."""

import argparse
import platform
from typing import Any

from rich import filesize
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine, runs, show
from benchmarks.arguments import add, add_out
from benchmarks.lowering.topologies import TOPOLOGIES, is_installed
from benchmarks.lowering.updates import CONFIG, METHODS, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    what = f"what to compile for: {'; '.join(TOPOLOGIES)}"
    add(parser, "--topology NAME", what, several="all", choices=TOPOLOGIES)
    what = f"what to compile: {'; '.join(METHODS)}"
    add(parser, "--method NAME", what, several="all", choices=METHODS)
    add_out(parser, "lower.json")


def run(options: argparse.Namespace) -> int:
    """Compiles, writes, prints; returns the exit status."""
    console = Console()
    wanted = dict.fromkeys(options.topology or TOPOLOGIES)
    names = [name for name in wanted if is_installed(TOPOLOGIES[name])]
    for name in wanted:
        if name not in names:
            text = "left out, its compiler is not installed; on Linux x86-64: pip install"
            console.print(f"{name}: {text} '.[bench,aot]'", markup=False, soft_wrap=True)
    if not names:
        return 1
    out = runs.folder("lower", options.out)
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    methods = dict.fromkeys(options.method or METHODS)
    pairs = [(name, method) for name in names for method in methods]
    for name, method in track(pairs, "compiling", console=console):
        results[name][method] = measure(name, method)
    packages = ("jax", "jaxlib", "optax", "flax", "libtpu", "jax-cuda13-plugin")
    content = {
        "question": "What do the compilers for TPU and GPU make of it?",
        "command": "python -m benchmarks lower",
        "python": platform.python_version(),
        "versions": machine.versions(*packages),
        "model": vars(CONFIG),
        "units": (
            "bytes of one device; wire_ratio: bytes that all devices receive, over those of all "
            "kernels; products: FLOPs of one device's matrix products, over an even share; reads "
            "of main memory for each element of the gradient"
        ),
        "results": results,
    }
    runs.write(out / "lower.json", content)
    for name, rows in results.items():
        console.print(_table(name, rows))
    show.wrote(console, out / "lower.json")
    return 0


def _table(topology: str, rows: dict[str, dict[str, Any]]) -> Table:
    lines = []
    for method, row in rows.items():
        used = "\n".join(f"{n} {kind}" for kind, n in row["collectives"].items())
        sizes = [filesize.decimal(row[f"{name}_bytes"]) for name in ("wire", "temporary")]
        figures = [str(row[x]) for x in ("products", "reads", "compile_seconds")]
        lines.append([method.removeprefix("optax."), used or "none", *sizes, *figures])
    first = next(iter(rows.values()))
    size = filesize.decimal(first["gradient_bytes"])
    return show.table(
        f"{topology}: {first['leaves']} leaves, {size} a device",
        ["", "collectives", "received", "tempo-\nraries", "prod-\nucts", "reads", "compile\ns"],
        lines,
        "Optax's names stand without optax. Received, temporaries: of one device. Products: of one "
        "device, over an even share. Reads: of main memory, for each element.",
    )
