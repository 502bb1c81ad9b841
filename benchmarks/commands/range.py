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


def spans(norms: Mapping[str, Norms]) -> dict[str, dict[str, tuple[float, float] | None]]:
    """By dtype and method the magnitudes from which to which the norm is 1 within 1 %.

    Of each the ends of the longest run of them; None where there is none.
    """

    def span(elements: Sequence[float], values: Sequence[Any]) -> tuple[float, float] | None:
        pairs = zip(elements, map(float, values), strict=True)
        runs = itertools.groupby(pairs, lambda pair: abs(pair[1] - 1) <= TOLERANCE)
        right = ([x for x, _ in own] for is_right, own in runs if is_right)
        longest = max(right, key=len, default=None)
        return (longest[0], longest[-1]) if longest else None

    return {
        dtype: {name: span(own["elements"], own[name]) for name in own if name != "elements"}
        for dtype, own in norms.items()
    }


def extents(norms: Mapping[str, Norms]) -> list[list[str]]:
    """The same as text: a row a dtype, such as "1e-18 to 1e+17"."""
    return [
        [dtype, *(f"{x[0]:.2g} to {x[1]:.2g}" if x else "never" for x in own.values())]
        for dtype, own in spans(norms).items()
    ]


def _norm(result: jax.Array) -> float | str:
    sizes = np.abs(np.asarray(result).astype(np.float64))
    largest = float(sizes.max())
    if not math.isfinite(largest):
        return str(largest)
    scale = largest or 1.0
    return float(f"{scale * math.sqrt(np.sum(np.square(sizes / scale))):.4g}")


def plot(norms: Mapping[str, Norms]) -> Figure:
    """Bars over the magnitudes with norm 1, and beside them the norm at the ends of the range."""
    figure, panels = show.panels(len(norms), 2, (5.5, 2.1), sharey=True)
    found = spans(norms)
    for axes, (dtype, columns) in zip(panels, norms.items(), strict=True):
        # Matplotlib's own log axis overflows at float64's ends.
        powers = np.log10(columns["elements"])
        normal = np.log10(float(jnp.finfo(dtype).tiny))
        first = int(np.argmax(powers >= normal))
        for row, name in enumerate(METHODS):
            color, (low, high) = show.color(name), np.log10(found[dtype][name] or (1, 1))
            axes.barh(row, high - low, 0.6, low, color=color)
            for end, at, side in ((first, low, "right"), (-1, high, "left")):
                norm = float(columns[name][end])
                if not abs(norm - 1) <= TOLERANCE:
                    axes.text(at, row, f" {norm:.2g} ", color=color, ha=side, va="center")
        axes.axvspan(powers[0], normal, color="moccasin", zorder=0)
        axes.set(title=dtype, xlabel="magnitude of each element", xlim=powers[[0, -1]])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$" if power else "1")
    panels[0].set_yticks(range(len(METHODS)), METHODS)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"Bars: where the norm is 1, {show.LEGEND}. Beside them: the norm at the least normal\n"
        "number and at the largest. Shaded: subnormal numbers, which XLA makes 0 in all but float16"
    )
    return figure
