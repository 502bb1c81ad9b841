"""The table and the picture show what was recorded, and flag what is amiss."""

import sys

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from optax_unitscale import norms_table, plot_norms

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def rows(table: Table) -> dict[str, tuple[str, ...]]:
    names, *columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return dict(zip(names, zip(*columns, strict=True), strict=True))


def shown(table: Table, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_table_has_norms_ratios_and_flags():
    norms = {
        "dead": 0.0,
        "exploded": jnp.float32(1e38),
        "inf": np.float32(np.inf),
        "large": 1999.0,
        "median": jnp.float32(2.0),
        "nan": np.nan,
        "none": None,
        "small": 0.0021,
        "vanished": 1e-30,
    }
    assert rows(norms_table(norms)) == {
        "dead": ("0", "0", "dead"),
        "exploded": ("1e+38", "5e+37", "exploded"),
        "inf": ("inf", "-", "non-finite"),
        "large": ("2e+03", "1e+03", ""),
        "median": ("2", "1", ""),
        "nan": ("nan", "-", "non-finite"),
        "none": ("nan", "-", "non-finite"),
        "small": ("0.0021", "0.00105", ""),
        "vanished": ("1e-30", "5e-31", "vanished"),
    }
    summary = "9 norms, median 2 1 dead, 1 vanished, 1 exploded, 3 non-finite"
    assert " ".join(shown(norms_table(norms), 80)).endswith(summary)


@pytest.mark.parametrize(("norm", "flag"), [(0.001, ""), (0.0009, "vanished"), (1e3, "")])
def test_a_thousandth_and_a_thousandfold_are_not_flagged_yet(norm, flag):
    norms = {"a": norm, **dict.fromkeys("bcd", 1.0)}
    assert rows(norms_table(norms))["a"][-1] == flag
    assert rows(norms_table({**norms, "a": 1001.0}))["a"][-1] == "exploded"


def test_names_are_shown_as_they_are():
    # To Rich [min] is markup, and to Matplotlib $x$ is mathematics.
    names = ["a[min]", "[red]b[/red]", "$x$ $y$", ":smile:"]
    lines = shown(norms_table(dict.fromkeys(names, 1.0)), 80)
    assert all(any(name in line for line in lines) for name in names)
    axes = plot_norms([dict.fromkeys(names, 1.0)])
    axes.figure.canvas.draw()
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())


def test_a_long_name_is_folded_and_loses_nothing():
    name = "/".join(f"module_{i}" for i in range(20))
    lines = shown(norms_table({name: 1.0, "b": 1e-9}), 60)
    assert max(map(len, lines)) <= 60
    assert "".join(line.split(" ")[0] for line in lines[3:]).startswith(name)
    assert any("1e-09" in line and "vanished" in line for line in lines)


def test_print_shows_the_table():
    printed = f"{norms_table({'a': 1.0, 'b': 0.0})}"
    assert printed.splitlines()[0].split() == ["layer", "norm", "/", "median", "flag"]
    assert printed.endswith("\nb          0          0   dead\n2 norms, median 1\n1 dead")


def test_a_notebook_shows_the_table_as_html():
    bundle = norms_table({"a": 1.0, "b": 0.0})._repr_mimebundle_(include=[], exclude=[])
    assert "dead" in bundle["text/html"]
    assert "color: #800080" in bundle["text/html"]


@pytest.mark.parametrize("norms", [[{"a": 1.0}], jnp.ones(3), 1.0])
def test_the_table_is_of_one_step(norms):
    with pytest.raises(TypeError, match=r"expected the dict of one step, such as history\[-1\]"):
        norms_table(norms)
    with pytest.raises(ValueError, match="norms_table: there are no norms"):
        norms_table({})


def drawn(axes: Axes) -> np.ndarray:
    """The norms of a picture's cells."""
    values = axes.images[0].get_array()
    assert values is not None
    return values


def pixels(axes: Axes) -> np.ndarray:
    """The colour in the middle of each cell, in an array of layers, columns and RGBA."""
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    rendered = np.asarray(canvas.buffer_rgba()) / 255
    layers, columns = drawn(axes).shape
    left, right, *_ = axes.images[0].get_extent()
    x, y = np.meshgrid(left + (np.arange(columns) + 0.5) * (right - left) / columns, range(layers))
    column, row = axes.transData.transform(np.stack([x, y], axis=-1).reshape(-1, 2)).T.astype(int)
    return rendered[len(rendered) - 1 - row, column].reshape(layers, columns, 4)


def test_each_cell_has_its_norms_colour_over_all_of_float32():
    norms = 10.0 ** np.linspace(-37, 37, 6).reshape(2, 3)
    axes = plot_norms({"a": norms[0], "b": norms[1]})
    image = axes.images[0]
    assert isinstance(image.norm, LogNorm)
    assert image.get_clim() == (norms.min(), norms.max())
    np.testing.assert_allclose(pixels(axes), image.cmap(image.norm(norms)), atol=0.01)
    assert len(np.unique(pixels(axes).reshape(6, 4), axis=0)) == 6
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "")
    colorbar = image.colorbar
    assert colorbar is not None
    assert colorbar.ax.get_ylabel() == "gradient norm"
    assert colorbar.extend == "neither"


def test_a_rare_spike_does_not_stretch_the_scale_but_shows():
    axes = plot_norms({"a": np.where(np.arange(300) == 7, 1e20, np.arange(1, 301))})
    assert axes.images[0].get_clim() == (2, 300)
    colorbar = axes.images[0].colorbar
    assert colorbar is not None
    assert colorbar.extend == "both"
    np.testing.assert_allclose(pixels(axes)[0, 7], axes.images[0].cmap(1.0), atol=0.01)


def test_zero_is_white_and_what_is_not_finite_red():
    history = [{"a": 1.0, "b": 0.0}, {"a": np.nan, "b": 2.0}, {"a": None, "b": np.inf}]
    axes = plot_norms(history, label="step ratio")
    colorbar = axes.images[0].colorbar
    assert colorbar is not None
    assert colorbar.ax.get_ylabel() == "step ratio"
    red, white = to_rgba("red"), to_rgba("white")
    seen = pixels(axes)
    np.testing.assert_allclose(seen[[0, 0, 1], [1, 2, 2]], [red] * 3)
    np.testing.assert_allclose(seen[1, 0], white)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["zero", "not finite"]
    assert plot_norms([{"a": 1.0}]).get_legend() is None


@pytest.mark.parametrize("norm", [5e-324, 1e-45, 1.7e308])
def test_nothing_but_the_least_or_the_largest_is_a_picture_too(norm):
    axes = plot_norms({"a": np.full(3, norm)})
    assert (pixels(axes)[0] == pixels(axes)[0, 0]).all()
    low, high = axes.images[0].get_clim()
    np.testing.assert_allclose(high / low, 10)


def test_nothing_but_zeros_is_a_picture_too():
    np.testing.assert_allclose(pixels(plot_norms({"a": np.zeros(3)})), 1.0)


def test_small_differences_do_not_span_all_colours():
    low, high = plot_norms([{"a": 1.0, "b": 1.1}]).images[0].get_clim()
    np.testing.assert_allclose(high / low, 10)
    assert low < 1 < 1.1 < high


def test_thousands_of_steps_share_columns_that_hide_neither_zero_nor_nan():
    norms = np.repeat([1.0, 100.0], 1001)
    zero, nan = (np.where(np.arange(2002) == 777, odd, norms) for odd in (0.0, np.nan))
    axes = plot_norms({"plain": norms, "zero": zero, "nan": nan}, axes=plt.figure().subplots())
    # Columns of six steps, the last of four; the 167th is half 1 and half 100.
    assert drawn(axes).shape == (3, 334)
    assert axes.get_xlabel() == "step (geometric mean of every 6)"
    # The last column's other two would be beyond the last step.
    assert axes.images[0].get_extent()[:2] == [0.5, 2004.5]
    assert axes.get_xlim() == (0.5, 2002.5)
    plain = drawn(axes)[1]
    np.testing.assert_allclose(plain, [*[1] * 166, 100 ** (1 / 6), *[100] * 167], rtol=1e-12)
    # Layers stand in the order of their names.
    seen = pixels(axes)[[0, 2], 777 // 6]
    np.testing.assert_allclose(seen, [to_rgba("red"), to_rgba("white")], atol=0.01)


@pytest.mark.parametrize("size", [None, (4, 3)], ids=["own figure", "given axes"])
@pytest.mark.parametrize("layers", [1, 31, 500])
def test_names_are_legible_and_the_figure_bounded(layers, size):
    history = [{f"blocks/{i}/kernel": 1.0 + i for i in range(layers)}]
    given = plt.figure(figsize=size, layout="constrained").subplots() if size else None
    axes = plot_norms(history, axes=given)
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    assert axes is given or figure.get_size_inches()[1] <= 14
    labels = axes.get_yticklabels()
    assert labels[0].get_text() == "blocks/0/kernel"
    boxes = [label.get_window_extent() for label in labels]
    assert all(box.x0 >= 0 for box in boxes)
    middles = [(box.y0 + box.y1) / 2 for box in boxes]
    # Eight points of text, whose boxes have room for accents.
    assert all(np.abs(np.diff(middles)) >= 8 / 72 * figure.dpi)
    if len(labels) < layers:
        every = -(-layers // len(labels))
        assert axes.get_ylabel() == f"layer (one in {every} is named)"
        assert labels[1].get_text() == f"blocks/{every}/kernel"


def test_a_picture_in_given_axes_opens_no_figure_and_can_share_a_scale():
    axes = Figure().subplots()
    assert plot_norms([{"a": 1.0}], axes=axes, colorbar=False) is axes
    assert axes.images[0].colorbar is None
    assert plt.get_fignums() == []


def test_axes_without_a_figure_are_refused():
    axes = Figure().subplots()
    axes.remove()
    with pytest.raises(ValueError, match="axes were removed from their figure"):
        plot_norms([{"a": 1.0}], axes=axes)


@pytest.mark.parametrize(
    ("missing", "call"),
    [("rich", lambda: norms_table({"a": 1.0})), ("matplotlib", lambda: plot_norms([{"a": 1.0}]))],
)
def test_without_the_extra_the_error_says_what_to_install(missing, call, monkeypatch):
    # None is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, missing, None)
    message = rf": {missing} is not installed. Install it: pip install {missing}$"
    with pytest.raises(ModuleNotFoundError, match=message):
        call()
