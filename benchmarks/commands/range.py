"""Shows at which magnitudes of the gradient its normalised form has norm 1, for five methods."""

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from benchmarks import machine, runs, show
from benchmarks.arguments import add_out
from optax_unitscale import unit_scale

ELEMENTS = 1000
# The decades between one magnitude and the next.
DTYPES = {"float16": 0.25, "bfloat16": 1.0, "float32": 1.0, "float64": 1.0}
# A norm counts as 1 within this much, so that bfloat16, with two to three digits, can pass.
TOLERANCE = 0.01
# For each dtype the magnitudes, "elements", and each method's norms.
Norms = dict[str, list[Any]]


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
STYLES: list[dict[str, Any]] = [
    {"color": show.color("unit_scale"), "linewidth": 6, "alpha": 0.45},
    *({"color": show.color(""), "linewidth": 0.8, "marker": x, "markersize": 4} for x in "osx^"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_out(parser, "range.json and range.png")


def run(options: argparse.Namespace) -> None:
    """Measures, writes, prints."""
    console, out = Console(), runs.folder("range", options.out)
    norms = {dtype: measure(dtype) for dtype in DTYPES}
    content = {
        "question": "At which magnitudes does a normalised gradient have norm 1?",
        "command": "python -m benchmarks range",
        **machine.about("jax", "jaxlib", "optax", "numpy"),
        "input": f"{ELEMENTS} equal elements; the l2 norm of the result, where 1 is right",
        "norms": norms,
    }
    runs.write(out / "range.json", content)
    caption = f"{ELEMENTS} equal elements: from which to which the norm is 1 within 1 %."
    console.print(show.table("", ["dtype", *METHODS], extents(norms), caption))
    show.save(plot(norms), out / "range.png", console)
    show.wrote(console, out / "range.json")


def measure(dtype: str) -> Norms:
    """The l2 norm of each method's result for 1000 equal elements, over all their magnitudes.

    Four digits; what is not finite is a text, for JSON has neither NaN nor infinity.
    """
    finfo = jnp.finfo(dtype)
    lowest, highest = math.log10(float(finfo.smallest_subnormal)), math.log10(float(finfo.max))
    steps = range(math.ceil(lowest / DTYPES[dtype]), math.floor(highest / DTYPES[dtype]) + 1)
    elements = [float(f"{10 ** (step * DTYPES[dtype]):.3g}") for step in steps]
    inputs = [np.full(ELEMENTS, element).astype(finfo.dtype) for element in elements]
    with jax.enable_x64(dtype == "float64"):
        compiled = {name: jax.jit(method) for name, method in METHODS.items()}
        norms = {name: [_norm(method(x)) for x in inputs] for name, method in compiled.items()}
    return {"elements": elements, **norms}


def extents(norms: Mapping[str, Any]) -> list[list[str]]:
    """A row a dtype: over which magnitudes the norm of each method is 1 within 1 %.

    Of each the ends of the longest run of them, as "1e-18 to 1e+17".
    """

    def extent(elements: Sequence[float], values: Sequence[float]) -> str:
        pairs = zip(elements, map(float, values), strict=True)
        runs = itertools.groupby(pairs, lambda pair: abs(pair[1] - 1) <= TOLERANCE)
        right = ([x for x, _ in own] for is_right, own in runs if is_right)
        longest = max(right, key=len, default=None)
        return f"{longest[0]:.2g} to {longest[-1]:.2g}" if longest else "never"

    return [
        [dtype, *(extent(own["elements"], own[name]) for name in own if name != "elements")]
        for dtype, own in norms.items()
    ]


def _norm(result: jax.Array) -> float | str:
    sizes = np.abs(np.asarray(result).astype(np.float64))
    largest = float(sizes.max())
    if not math.isfinite(largest):
        return str(largest)
    scale = largest or 1.0
    return float(f"{scale * math.sqrt(np.sum(np.square(sizes / scale))):.4g}")


def plot(norms: Mapping[str, Norms]) -> Figure:
    """Norm of the result against magnitude, log-log, with rows for 0, infinity and NaN."""
    figure, panels = show.panels(len(norms), 2, (5.5, 3.3))
    for axes, (dtype, columns) in zip(panels, norms.items(), strict=True):
        _panel(axes, dtype, columns)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _panel(axes: Axes, dtype: str, columns: Norms) -> None:
    # Matplotlib's own log axis overflows at float64's ends.
    powers = np.log10(columns["elements"])
    drawn = np.array([columns[name] for name in METHODS], float)
    logs = np.log10(drawn[np.isfinite(drawn) & (drawn > 0)])
    low, high = math.floor(logs.min()), max(1, math.ceil(logs.max()))
    row = (high - low) / 6
    rows = {"0": low - row, "inf": high + row, "NaN": high + 2 * row}
    for middle in rows.values():
        axes.axhspan(middle - row / 2, middle + row / 2, color="0.93", ec="0.7", zorder=0)
    for lane, (name, norms, style) in enumerate(zip(METHODS, drawn, STYLES, strict=True)):
        with np.errstate(divide="ignore", invalid="ignore"):
            heights = np.log10(norms)
        # In a row each method has a lane of its own, for there they would hide each other.
        for label, there in (("0", norms == 0), ("inf", np.isinf(norms)), ("NaN", np.isnan(norms))):
            heights[there] = rows[label] + row * (2 - lane) / 6
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
