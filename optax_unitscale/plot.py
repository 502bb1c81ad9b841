"""`norms_table` and `plot_norms`: the gradient norms of any training loop, to look at.

The table needs rich and the picture Matplotlib, which nothing else here does.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_unitscale.history import FLAGS, flag, lines_of, median_of, norm_ratios

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["norms_table", "plot_norms", "printed_table"]

STYLES = dict(zip(FLAGS, ("magenta", "blue", "red", "bold red"), strict=True))
# No more than a figure has pixels, so that each step is seen.
MOST_COLUMNS = 400
# In inches: a layer, the shortest and the tallest figure, a line of text.
LAYER, SHORTEST, TALLEST, TEXT = 0.18, 2.4, 14.0, 0.115


def norms_table(norms: Mapping[str, Any]) -> "Table":
    """One step's gradient norms by layer, with a flag where a layer does not train like the rest.

    With n a layer's norm, and r its ratio to the median of those that are finite and not zero:

    ==========  ================================================================
    flag        when
    ==========  ================================================================
    dead        n = 0
    non-finite  n is NaN, infinite, or None, which JSON has in their place
    vanished    0 < r < 0.001
    exploded    1000 < r < ∞
    ==========  ================================================================

    Smaller differences can be healthy: the l2 norms of a scalar and of a matrix of a million
    elements differ a thousandfold by their sizes alone.

    Args:
      norms: what `gradient_norms` or `recorded_norms` returns, or floats by name. An array
        gives a line for each slice, "blocks/kernel[3]"; one of more than 128 slices gives three,
        its least, median and largest norm.

    Returns:
      A `rich.table.Table`, which a notebook shows as it is, `print` as text and `rich.print` in
      colour. Its lines are the layers in natural order, with their norm, its ratio to the median,
      and the flag.

    Raises:
      ModuleNotFoundError: rich is not installed.
      TypeError: `norms` is not the dict of one step, its names are not strings, or its values
        neither numbers nor arrays.
      ValueError: `norms` is empty.

    Examples:
      One line in a notebook is ``norms_table(recorded_norms(opt_state, params))``, for a state
      that `record_norms` keeps.

      >>> from optax_unitscale import norms_table
      >>> norms = {"layers/2": 3.0, "layers/10": 2.0, "layers/1": 4e-9, "head": 0.0}
      >>> print(norms_table(norms))
      layer        norm   / median   flag
      ───────────────────────────────────────
      head            0          0   dead
      layers/1    4e-09      2e-09   vanished
      layers/2        3        1.5
      layers/10       2          1
      4 norms, median 2
      1 dead, 1 vanished
    """
    if not isinstance(norms, Mapping):
        raise TypeError(
            f"norms_table: norms is a {type(norms).__name__}, expected the dict of one step, such "
            "as history[-1]."
        )
    lines = lines_of("norms_table", [norms])
    ratios = norm_ratios([norms])
    table = printed_table("norms_table")
    from rich.text import Text

    table.add_column("layer", overflow="fold")
    for heading in ("norm", "/ median"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("flag", no_wrap=True)
    flags = []
    for name, (norm,) in lines.items():
        (ratio,) = ratios[name]
        flags.append(flag(norm, ratio))
        shown = f"{ratio:.3g}" if math.isfinite(ratio) else "-"
        # Not a plain string, in which Rich would take [min] for markup.
        table.add_row(Text(name), f"{norm:.3g}", shown, flags[-1], style=STYLES.get(flags[-1]))
    (median,) = median_of(np.array(list(lines.values())))
    counts = [f"{flags.count(kind)} {kind}" for kind in FLAGS if kind in flags]
    table.caption = f"{len(lines)} norms, median {median:.3g}\n{', '.join(counts) or 'no flags'}"
    return table


def printed_table(caller: str) -> "Table":
    """An empty table that `print` shows."""
    with _installed(caller):
        from rich import box
        from rich.console import Console
        from rich.table import Table

    class PrintedTable(Table):
        """Rich's tables are shown by `rich.print` and in notebooks; this one by `print` too."""

        def __repr__(self) -> str:
            console = Console(color_system=None, force_jupyter=False)
            if not console.is_terminal:  # A log has room for long names.
                console.width = 200
            with console.capture() as capture:
                console.print(self)
            return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))

    return PrintedTable(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left"
    )


def plot_norms(
    history: Iterable[Mapping[str, Any]] | Mapping[str, Any],
    *,
    axes: "Axes | None" = None,
    colorbar: bool = True,
    label: str = "gradient norm",
) -> "Axes":
    """A heat map of gradient norms or of `step_ratios`, layer by step, on a logarithmic scale.

    White is a norm of zero, red one that is not finite. The scale spans a decade or more, and
    leaves out one norm in two hundred at either end, which then has the colour of that end.

    Args:
      history: a dict for each step, as for `norms_table`, or the dict of arrays that `jax.lax.scan`
        stacks from them, whose first axis is the step. More than 400 steps share columns, each
        with the geometric mean of its steps; it is zero or not finite where one of them is.
      axes: where to draw, instead of a figure of its own, which is at most 14 inches high. Where
        there are more layers than lines of text, every second, third, … is named.
      colorbar: whether to draw the scale. To share one among several axes, set the same limits by
        ``axes.images[0].set_clim``.
      label: what the scale is of, such as "step ratio".

    Returns:
      The Matplotlib axes; ``plot_norms(history).figure.savefig("norms.png")`` writes a file.

    Raises:
      ModuleNotFoundError: Matplotlib is not installed.
      TypeError: `history` is neither dicts of norms nor a dict of arrays, its names are not
        strings, or its values neither numbers nor arrays.
      ValueError: there are no steps or no norms, the steps differ in names or shapes, there is one
        number where one for each step is expected, or `axes` belong to no figure.

    Examples:
      One line in a notebook is ``plot_norms(history)``, after a loop that did
      ``history.append(recorded_norms(opt_state, params))`` each step.

      >>> from matplotlib.figure import Figure
      >>> from optax_unitscale import plot_norms
      >>> history = [{"bias": 0.0, "kernel": 10.0**-step} for step in range(5)]
      >>> axes = plot_norms(history, axes=Figure().subplots())
      >>> [label.get_text() for label in axes.get_yticklabels()]
      ['bias', 'kernel']
    """
    lines = lines_of("plot_norms", history)
    norms = np.array(list(lines.values()))
    with _installed("plot_norms"):
        from matplotlib import pyplot as plt
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import MaxNLocator
    names = [name if len(name) <= 60 else f"…{name[-59:]}" for name in lines]
    if axes is None:
        height = min(max(1.2 + LAYER * len(names), SHORTEST), TALLEST)
        size = (7 + 0.07 * max(map(len, names)), height)
        _, axes = plt.subplots(figsize=size, layout="constrained")
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError(
            "plot_norms: axes were removed from their figure, expected those of one, such "
            "as matplotlib.pyplot.subplots() makes."
        )
    steps = norms.shape[1]
    wide = math.ceil(steps / MOST_COLUMNS)
    norms = _geometric_means(norms, wide) if wide > 1 else norms
    extent = (0.5, wide * norms.shape[1] + 0.5, len(names) - 0.5, -0.5)
    layout: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    positive = np.ma.masked_where(~((norms > 0) & np.isfinite(norms)), norms)
    # Near the ends of float64 Matplotlib has no limits and no ticks.
    seen = positive.compressed().clip(1e-200, 1e200)
    low = np.quantile(seen, 0.005, method="lower") if seen.size else 1.0
    high = np.quantile(seen, 0.995, method="higher") if seen.size else 1.0
    # A decade at least, or the slightest noise would show all colours.
    margin = max(1.0, math.sqrt(10 * low / high))
    low, high = low / margin, high * margin
    image = axes.imshow(positive, norm=LogNorm(low, high), **layout)
    _draw_marks(axes, norms, layout)
    axes.set_xlim(0.5, steps + 0.5)
    axes.set_xlabel("step" if wide == 1 else f"step (geometric mean of every {wide})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    every = math.ceil(len(names) * TEXT * figure.dpi / axes.get_window_extent().height)
    ticks = range(0, len(names), every)
    axes.set_yticks(ticks, [names[i] for i in ticks], fontsize=8, parse_math=False)
    if every > 1:
        axes.set_ylabel(f"layer (one in {every} is named)")
    if colorbar:
        below, above = bool((seen < low).any()), bool((seen > high).any())
        extend = "both" if below and above else "min" if below else "max" if above else "neither"
        figure.colorbar(image, ax=axes, extend=extend, label=label)
    return axes


def _draw_marks(axes: "Axes", norms: np.ndarray, layout: dict[str, Any]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    handles = []
    marks = {"zero": ("white", norms == 0), "not finite": ("red", ~np.isfinite(norms))}
    for label, (colour, where) in marks.items():
        if where.any():
            axes.imshow(np.ma.masked_where(~where, where), cmap=ListedColormap([colour]), **layout)
            handles.append(Patch(facecolor=colour, edgecolor="grey", label=label))
    if handles:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2}
        axes.legend(handles=handles, **place, fontsize=8, frameon=False, borderaxespad=0.2)


def _geometric_means(norms: np.ndarray, steps: int) -> np.ndarray:
    """Of every `steps` columns one; 0 where one of them is, and not finite where one is not."""
    starts = np.arange(0, norms.shape[1], steps)
    counts = np.diff([*starts, norms.shape[1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(np.add.reduceat(np.log(norms), starts, axis=1) / counts)


@contextlib.contextmanager
def _installed(caller: str) -> Iterator[None]:
    """Says which package to install where one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{caller}: {error.name} is not installed. Install it: pip install {error.name}"
        ) from error
