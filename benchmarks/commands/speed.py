"""Times unit_scale and its alternatives on the gradients of GPTs, against the naive division."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import runs
from benchmarks.arguments import Parser, whole_number
from benchmarks.models.gpt import GPT, GPTConfig
from optax_unitscale import unit_scale

__all__ = ["MODELS", "SCOPES", "add_arguments", "run", "time_all"]

WARM_UP = 3
MODELS = {
    "1M": GPTConfig(vocabulary=256, context=256, depth=4, heads=4, width=144),
    "35M": GPTConfig(vocabulary=8192, context=512, depth=8, heads=8, width=512),
    "124M": GPTConfig(vocabulary=24576, context=1024, depth=12, heads=12, width=768),
    "350M": GPTConfig(vocabulary=24576, context=1024, depth=24, heads=16, width=1024),
}


def _transformation(made: optax.GradientTransformation) -> Callable[[Any], Any]:
    return lambda updates: made.update(updates, made.init(updates))[0]


def _naive_leaf(updates: Any) -> Any:
    return jax.tree.map(lambda x: x * jax.lax.rsqrt(jnp.sum(x * x)), updates)


def _naive_global(updates: Any) -> Any:
    scale = jax.lax.rsqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(updates)))
    return jax.tree.map(lambda x: x * scale, updates)


# The first of each is what the others are compared with.
SCOPES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "leaf": {
        "x * rsqrt(sum(x * x))": _naive_leaf,
        "unit_scale()": _transformation(unit_scale()),
        "optax.clip_by_block_rms(1)": _transformation(optax.clip_by_block_rms(1.0)),
    },
    "global": {
        "x * rsqrt(sum of all x * x)": _naive_global,
        'unit_scale(scope="global")': _transformation(unit_scale(scope="global")),
        "optax.normalize_by_update_norm()": _transformation(optax.normalize_by_update_norm()),
        "optax.clip_by_global_norm(1)": _transformation(optax.clip_by_global_norm(1.0)),
    },
    "ceiling": {
        "read": lambda updates: (updates, jax.tree.map(jnp.sum, updates)),
        "read and write": lambda updates: jax.tree.map(lambda x: x * 1.0001, updates),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--model",
        choices=MODELS,
        action="append",
        help="how many parameters; repeatable (default: 35M and 124M)",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number(5),
        default=40,
        metavar="N",
        help="how often each contender is timed, in turn (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for speed.json and speed.png (default: a new one under runs/)",
    )


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Measures, writes, prints; returns the exit status."""
    console = Console()
    out = runs.make(parser, options.out, "speed")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    results = {}
    with Progress(*columns, console=console) as progress:
        for model in dict.fromkeys(options.model or ["35M", "124M"]):
            task = progress.add_task(model, total=options.rounds)
            results[model] = time_all(model, options.rounds, lambda t=task: progress.advance(t))
    (out / "speed.json").write_text(_as_json(results, options.rounds))
    mpl.use("Agg")
    _plot(results, out / "speed.png")
    for model, rows in results.items():
        console.print(_table(model, rows))
    for name in ("speed.png", "speed.json"):
        console.print(f"wrote {out / name}", soft_wrap=True)
    return 0


def time_all(model: str, rounds: int, advance: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """Times every contender in turn, on one donated gradient that goes from hand to hand.

    Args:
      model: a key of `MODELS`.
      rounds: how often each is timed, after some rounds that do not count.
      advance: called after each round that counts.

    Returns:
      For each contender its scope, seconds (median and quartiles), the ratio of each of its times
      to that of its scope's first in the same round (median and quartiles), compile seconds, and
      temporaries in bytes.
    """
    shapes = nnx.eval_shape(lambda: nnx.state(GPT(MODELS[model], nnx.Rngs(0)), nnx.Param))
    leaves = jax.tree.leaves(shapes)
    rng = np.random.default_rng(0)
    updates = [jnp.asarray(rng.normal(size=x.shape).astype(np.float32)) for x in leaves]
    contenders = {name: (scope, f) for scope, fs in SCOPES.items() for name, f in fs.items()}
    programs, rows = {}, {}
    for name, (scope, function) in contenders.items():
        start = time.perf_counter()
        programs[name] = jax.jit(function, donate_argnums=0).lower(updates).compile()
        rows[name] = {
            "scope": scope,
            "compile_seconds": round(time.perf_counter() - start, 3),
            "temporary_bytes": programs[name].memory_analysis().temp_size_in_bytes,
            "parameters": sum(x.size for x in leaves),
        }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(WARM_UP + rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            result = jax.block_until_ready(program(updates))
            times[name].append(time.perf_counter() - start)
            updates = result[0] if name == "read" else result
        if i >= WARM_UP:
            advance()
    for name, row in rows.items():
        own = np.array(times[name][WARM_UP:])
        first = np.array(times[next(iter(SCOPES[row["scope"]]))][WARM_UP:])
        row["seconds"] = _quartiles(own)
        row["ratio"] = _quartiles(own / first)
    return rows


def _quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "median": float(f"{median:.4g}"),
        "low": float(f"{low:.4g}"),
        "high": float(f"{high:.4g}"),
    }


def _as_json(results: dict[str, dict[str, dict[str, Any]]], rounds: int) -> str:
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    content = {
        "question": "What does unit_scale cost beside the naive division?",
        "command": "python -m benchmarks speed",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "rounds": rounds,
        "spread": "quartiles; ratio: to the scope's first contender in the same round",
        "results": results,
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    return (
        re.sub(r"\{\s+(\"median\"[^}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text)
        + "\n"
    )


def _table(model: str, rows: dict[str, dict[str, Any]]) -> Table:
    parameters = next(iter(rows.values()))["parameters"]
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{parameters / 1e6:.0f} M float32 parameters",
        caption="Median (quartiles). Ratio: to the first of the scope, round by round.",
    )
    for heading in ("scope", "", "ms", "ratio", "temporaries\nMB", "compile\ns"):
        table.add_column(heading, justify="left" if heading in ("", "scope") else "right")
    last = ""
    for name, row in rows.items():
        ratio = row["ratio"]
        if last and row["scope"] != last:
            table.add_section()
        table.add_row(
            "" if row["scope"] == last else row["scope"],
            name,
            f"{row['seconds']['median'] * 1e3:.2f}",
            f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
            f"{row['temporary_bytes'] / 1e6:.2f}",
            f"{row['compile_seconds']:.2f}",
        )
        last = row["scope"]
    return table


def _plot(results: dict[str, dict[str, dict[str, Any]]], path: pathlib.Path) -> None:
    """Ratio to the naive division, with quartiles, a panel for each scope."""
    figure, panels = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", sharex=True)
    for axes, scope in zip(panels, ("leaf", "global"), strict=True):
        names = list(SCOPES[scope])
        for k, (model, rows) in enumerate(results.items()):
            ratios = [rows[name]["ratio"] for name in names]
            middle = np.array([ratio["median"] for ratio in ratios])
            low = middle - [ratio["low"] for ratio in ratios]
            high = np.array([ratio["high"] for ratio in ratios]) - middle
            shift = (k - (len(results) - 1) / 2) * 0.2
            axes.errorbar(
                middle, np.arange(len(names)) + shift, xerr=[low, high], fmt="o", label=model
            )
        axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(f"scope: {scope}", loc="left")
    panels[1].set_xlabel("time / time of the naive division (median and quartiles)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), title="parameters", loc="outside right upper"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
