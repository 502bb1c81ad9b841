"""Shows at which magnitudes of the gradient its normalised form has norm 1, for five methods."""

import argparse
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import optax.contrib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine, runs
from benchmarks.arguments import add_out
from optax_unitscale import unit_scale

__all__ = ["DTYPES", "METHODS", "add_arguments", "extent", "measure", "run"]

ELEMENTS = 1000
# The decades between one magnitude and the next.
DTYPES = {"float16": 0.25, "bfloat16": 1.0, "float32": 1.0, "float64": 1.0}
# A norm counts as 1 within this much, so that bfloat16, with two to three digits, can pass.
TOLERANCE = 0.01
ROWS = 8


def _transformation(made: optax.GradientTransformation) -> Callable[[jax.Array], Any]:
    return lambda x: made.update(x, made.init(x))[0]


METHODS: dict[str, Callable[[jax.Array], Any]] = {
    "unit_scale()": _transformation(unit_scale()),
    "optax.normalize_by_update_norm()": _transformation(optax.normalize_by_update_norm()),
    "optax.contrib.normalize()": _transformation(optax.contrib.normalize()),
    "x / norm(x)": lambda x: x / jnp.linalg.norm(x),
    "x / (norm(x) + 1e-8)": lambda x: x / (jnp.linalg.norm(x) + 1e-8),
}
# Ours lies beneath the others, wide, for near 1 they all meet.
STYLES: dict[str, dict[str, Any]] = {
    "unit_scale()": {"color": "tab:green", "linewidth": 6, "alpha": 0.45},
    "optax.normalize_by_update_norm()": {"color": "tab:blue", "marker": "o", "markersize": 2.5},
    "optax.contrib.normalize()": {"color": "tab:red", "marker": "s", "markersize": 2.5},
    "x / norm(x)": {"color": "tab:purple", "marker": "x", "markersize": 3.5},
    "x / (norm(x) + 1e-8)": {"color": "black", "marker": "^", "markersize": 2.5},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_out(parser, "range.json and range.png")


def run(options: argparse.Namespace) -> int:
    """Measures, writes, prints; returns the exit status."""
    console = Console()
    mpl.use("Agg")
    with runs.folder("range", options.out) as out:
        results = {dtype: measure(dtype) for dtype in DTYPES}
        runs.write(out / "range.json", _as_json(results))
        _plot(results, out / "range.png")
        console.print(_table(results))
        for name in ("range.png", "range.json"):
            console.print(f"wrote {out / name}", soft_wrap=True)
    return 0


def measure(dtype: str) -> dict[str, list[float]]:
    """The l2 norm of each method's result for 1000 equal elements, over all their magnitudes.

    Args:
      dtype: the elements' dtype, a key of `DTYPES`.

    Returns:
      `"elements"`, the magnitudes, subnormal ones included, and for each method one norm for each.
    """
    finfo = jnp.finfo(dtype)
    lowest, highest = math.log10(float(finfo.smallest_subnormal)), math.log10(float(finfo.max))
    steps = range(math.ceil(lowest / DTYPES[dtype]), math.floor(highest / DTYPES[dtype]) + 1)
    elements = [float(f"{10 ** (step * DTYPES[dtype]):.3g}") for step in steps]
    inputs = [np.full(ELEMENTS, element).astype(finfo.dtype) for element in elements]
    with jax.enable_x64(dtype == "float64"):
        norms = {
            name: [_norm(method(x)) for x in inputs]
            for name, method in ((name, jax.jit(method)) for name, method in METHODS.items())
        }
    return {"elements": elements, **norms}


def extent(elements: list[float], norms: list[float]) -> str:
    """The ends of the longest run of magnitudes whose norm is 1 within 1 %, as "1e-18 to 1e+17"."""
    right = [abs(norm - 1) <= TOLERANCE for norm in norms]
    stretches = [
        [element for element, _ in stretch]
        for is_right, stretch in itertools.groupby(
            zip(elements, right, strict=True), lambda x: x[1]
        )
        if is_right
    ]
    longest = max(stretches, key=len, default=None)
    return f"{longest[0]:.2g} to {longest[-1]:.2g}" if longest else "never"


def _norm(result: jax.Array) -> float:
    sizes = np.abs(np.asarray(result).astype(np.float64))
    largest = float(sizes.max())
    if not 0 < largest < math.inf:
        return largest
    return largest * math.sqrt(np.sum(np.square(sizes / largest)))


def _as_json(results: dict[str, dict[str, list[float]]]) -> str:
    # JSON has neither NaN nor infinity.
    def number(value: float) -> float | str:
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)

    packages = ("jax", "jaxlib", "optax", "numpy")
    content = {
        "question": "At which magnitudes does a normalised gradient have norm 1?",
        "command": "python -m benchmarks range",
        **machine.about(*packages),
        "input": f"{ELEMENTS} equal elements; the l2 norm of the result, where 1 is right",
        "norms": {
            dtype: {name: [number(value) for value in values] for name, values in columns.items()}
            for dtype, columns in results.items()
        },
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    return re.sub(r"\n {8}|\n {6}(?=\])", " ", text) + "\n"


def _table(results: dict[str, dict[str, list[float]]]) -> Table:
    """Some magnitudes of each dtype, and where each method is right."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="Norm of the result: 1 is right",
        caption=f"{ELEMENTS} equal elements; right: from which to which element within 1 %.",
    )
    for heading in ("dtype", "element", *METHODS):
        # The long names break where a reader would break them.
        table.add_column(re.sub(r"(?<=[._/]) ?| (?=\+)", "\n", heading), justify="right")
    for dtype, columns in results.items():
        elements = columns["elements"]
        chosen = np.linspace(0, len(elements) - 1, ROWS).round().astype(int)
        for i in chosen:
            norms = [f"{columns[name][i]:.3g}" for name in METHODS]
            table.add_row(dtype, f"{elements[i]:.2g}", *norms)
        cells = [extent(elements, columns[name]).replace(" ", "\n", 1) for name in METHODS]
        table.add_row(dtype, "right", *cells, style="bold", end_section=True)
    return table


def _plot(results: dict[str, dict[str, list[float]]], path: pathlib.Path) -> None:
    """Norm of the result against magnitude, log-log, with rows for 0, infinity and NaN."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    with mpl.rc_context({"lines.linewidth": 0.8}):
        for axes, (dtype, columns) in zip(panels.flat, results.items(), strict=True):
            _panel(axes, dtype, columns)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Axes, dtype: str, columns: dict[str, list[float]]) -> None:
    # Matplotlib's own log axis overflows at float64's ends.
    powers = np.log10(columns["elements"])
    drawn = np.array([columns[name] for name in METHODS])
    logs = np.log10(drawn[np.isfinite(drawn) & (drawn > 0)])
    low, high = math.floor(logs.min()), max(1, math.ceil(logs.max()))
    row = (high - low) / 6
    rows = {"0": low - row, "inf": high + row, "NaN": high + 2 * row}
    for label, middle in rows.items():
        axes.axhspan(middle - row / 2, middle + row / 2, color="0.93", zorder=0)
        axes.axhline(middle + (row if label == "0" else -row) / 2, color="0.7", linewidth=0.8)
    for lane, (name, style) in enumerate(STYLES.items()):
        # In a row each method has a lane of its own, for there they would hide each other.
        shift = row * (2 - lane) / 6
        norms = np.array(columns[name])
        with np.errstate(divide="ignore", invalid="ignore"):
            heights = np.log10(norms)
        heights[norms == 0] = rows["0"] + shift
        heights[np.isinf(norms)] = rows["inf"] + shift
        heights[np.isnan(norms)] = rows["NaN"] + shift
        axes.plot(powers, heights, label=name, markevery=max(2, len(powers) // 40), **style)
    normal = np.log10(float(jnp.finfo(dtype).tiny))
    axes.axvspan(powers[0], normal, color="moccasin", zorder=0, label="subnormal elements")
    ticks = {_decade(d): d for d in [*_decades(low, high), 0]} | rows
    axes.set_yticks(list(ticks.values()), list(ticks))
    decades = _decades(powers[0], powers[-1])
    axes.set_xticks(decades, map(_decade, decades))
    axes.set(title=dtype, xlabel="each element", ylabel="norm of the result")
    axes.set(xlim=powers[[0, -1]], ylim=(rows["0"] - row / 2, rows["NaN"] + row / 2))


def _decades(low: float, high: float) -> list[float]:
    return [d for d in MaxNLocator(6, integer=True).tick_values(low, high) if low <= d <= high]


def _decade(power: float) -> str:
    return f"$10^{{{power:.0f}}}$" if power else "1"
