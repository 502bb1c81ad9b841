"""The notebooks run from top to bottom, and what they show is what their code makes.

`python tests/test_notebooks.py notebooks/3_exactness.ipynb` writes a notebook's outputs anew.
"""

import base64
import contextlib
import copy
import importlib.util
import io
import itertools
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:e[+-]?\d+)?")
# A picture is compared as so many squares a side, by the darkest grey in each, from 0 to 255. A few
# may differ: fonts and widths are Matplotlib's affair; where curves and bars are is not.
SQUARES, PIXELS, GREY, FEW = 24, 16, 64, 0.06


def read(file: pathlib.Path) -> Any:
    """A notebook in the current format."""
    return nbformat.read(file, nbformat.NO_CONVERT)


def number_of(file: pathlib.Path) -> int:
    """The number that a notebook's name begins with."""
    return int(file.stem.split("_")[0])


def run(notebook: Any) -> Any:
    """A copy, executed by the environment's own Python.

    Raises:
      CellExecutionError: a cell raised.
    """
    fresh = copy.deepcopy(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        fresh, timeout=300, kernel_name="python3", record_timing=False, coalesce_streams=True
    )
    return client.execute(cwd=str(ROOT))


def refresh(file: pathlib.Path) -> None:
    """Writes a notebook's outputs anew, and nothing of the machine that made them."""
    notebook = read(file)
    fresh = run(notebook)
    fresh.metadata = notebook.metadata
    for cell in fresh.cells:
        cell.metadata = {}
    file.write_text(nbformat.writes(fresh) + "\n")


def check_outputs(committed: Any, executed: Any) -> None:
    """Every cell shows what it showed when it was committed."""
    for n, (old, new) in enumerate(zip(committed.cells, executed.cells, strict=True)):
        if old.cell_type == "code":
            check_cell(n, shown(old), shown(new))


def check_cell(n: int, old: Sequence[tuple[str, Any]], new: Sequence[tuple[str, Any]]) -> None:
    """Compares what one cell shows, as `shown` gives it."""
    kinds = [[kind for kind, _ in outputs] for outputs in (old, new)]
    assert kinds[0] == kinds[1], f"cell {n} shows {kinds[1]}, but {kinds[0]} is committed"
    for (kind, was), (_, now) in zip(old, new, strict=True):
        alike = similar(was, now) if kind == "image/png" else same_text(was, now)
        assert alike, f"cell {n} now shows {kind}\n{now}\nbut what is committed is\n{was}"


def shown(cell: Any) -> list[tuple[str, Any]]:
    """What a code cell shows, each with its kind: a stream, a picture, Markdown, text, an error."""
    outputs = []
    for output in cell.outputs:
        if output.output_type == "stream":
            outputs.append((output.name, output.text))
        elif output.output_type == "error":
            outputs.append(("error", output.evalue))
        else:
            # HTML says what the plain text beside it says.
            kinds = ("image/png", "text/markdown", "text/plain")
            kind = next(kind for kind in kinds if kind in output.data)
            outputs.append((kind, output.data[kind]))
    return outputs


def same_text(old: str, new: str) -> bool:
    """Whether texts are equal but for rounding.

    Processors add up in different orders: a number that is written with decimals may differ by two
    units of the last of them. All else, whole numbers too, is the same.
    """
    if NUMBER.split(old) != NUMBER.split(new):
        return False
    for was, now in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
        if "." not in was or "." not in now:
            if was != now:
                return False
            continue
        unit = max(int(Decimal(x).as_tuple().exponent) for x in (was, now))
        if abs(Decimal(was) - Decimal(now)) > 2 * Decimal(10) ** unit:
            return False
    return True


def similar(old: str, new: str) -> bool:
    """Whether two PNGs show the same picture."""
    first, second = (thumbnail(data) for data in (old, new))
    return float(np.mean(np.abs(first - second) > GREY)) <= FEW


def thumbnail(data: str) -> np.ndarray:
    """The darkest grey in each square of a PNG."""
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        # Whatever was transparent is white.
        white = Image.new("RGBA", image.size, "white")
        grey = Image.alpha_composite(white, image.convert("RGBA")).convert("L")
        side = SQUARES * PIXELS
        pixels = np.asarray(grey.resize((side, side), Image.Resampling.BOX), np.float64)
    return pixels.reshape(SQUARES, PIXELS, SQUARES, PIXELS).min(axis=(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_each_notebook_runs_and_shows_what_is_committed(file):
    committed = read(file)
    check_outputs(committed, run(committed))


def test_the_notebooks_are_numbered_from_one():
    assert FILES
    assert all(re.fullmatch(r"\d+_[a-z_]+", file.stem) for file in FILES)
    assert sorted(map(number_of, FILES)) == list(range(1, len(FILES) + 1))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_each_notebook_asks_a_question_shows_a_picture_and_asserts_its_claim(file):
    notebook = read(file)
    nbformat.validate(notebook)
    title, install, *_ = notebook.cells
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert title.cell_type == "markdown"
    assert title.source.startswith(f"# {number_of(file)}. ")
    assert title.source.endswith("?")
    assert install is code[0]
    assert "pip" in install.source
    assert not install.outputs
    assert 10 <= len(code) <= 20
    assert any(kind == "image/png" for cell in code for kind, _ in shown(cell))
    assert re.search(r"^ *assert |\bassert_", code[-1].source, re.MULTILINE)
    assert notebook.cells[-1] is code[-1]
    # No cell of a published notebook has failed, or warned.
    assert not {"stderr", "error"} & {kind for cell in code for kind, _ in shown(cell)}


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_each_notebook_opens_in_colab_and_names_no_machine(file):
    notebook = read(file)
    assert notebook.metadata == {
        "colab": {"name": file.name, "provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells)
    texts = [cell.source for cell in notebook.cells]
    texts += [x for cell in code for kind, x in shown(cell) if kind != "image/png"]
    assert not re.search(r"/(home|root|tmp|work|Users)/", "\n".join(texts))


def first_cell(file: pathlib.Path) -> str:
    """The cell that finds the package."""
    return next(cell.source for cell in read(file).cells if cell.cell_type == "code")


def test_first_cells_differ_in_the_other_packages_only():
    rest = [re.sub(r"PACKAGES = {[^}]*}", "", first_cell(file)) for file in FILES]
    assert len(set(rest)) == 1


@pytest.mark.parametrize("works", ["clone", "wheel", "index", None])
def test_the_first_cell_tries_clone_wheel_and_index_and_never_goes_on(works, tmp_path, monkeypatch):
    (tmp_path / "optax_unitscale").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    wheel = tmp_path / "notebooks" / "optax_unitscale-0.1.0-py3-none-any.whl"
    wheel.touch()
    sources = {"clone": str(tmp_path), "wheel": str(wheel), "index": "optax-unitscale"}
    tried = []

    def pip(command):
        tried.append(command[5].removesuffix("[plot]"))
        return subprocess.CompletedProcess(command, tried[-1] != sources.get(works))

    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", pip)
    stops = pytest.raises(ModuleNotFoundError, match=r"Upload optax_unitscale-\*\.whl")
    with contextlib.nullcontext() if works else stops:
        exec(first_cell(FILES[0]), {})
    places = list(sources)
    assert tried == [sources[x] for x in places[: places.index(works) + 1 if works else None]]


def test_the_first_cell_installs_nothing_where_all_is_there(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    for file in FILES:
        exec(first_cell(file), {})


DRAW = "import matplotlib.pyplot as plt\nplt.plot({})\nplt.show()"
SOURCES = ["print('a norm of 1.000')", "2**10", DRAW.format([0, 1])]


@pytest.fixture(scope="module")
def committed() -> Any:
    """What the next tests spoil."""
    cells = [nbformat.v4.new_code_cell(source) for source in SOURCES]
    return run(nbformat.v4.new_notebook(cells=cells))


@pytest.fixture(scope="module")
def changed(committed) -> Any:
    """The same, each cell of it changed."""
    stale = copy.deepcopy(committed)
    sources = ["print('a norm of 1.003')", "2**10 + 1", DRAW.format([1, 0])]
    for cell, source in zip(stale.cells, sources, strict=True):
        cell.source = source
    return run(stale)


def test_fresh_outputs_pass_the_check(committed):
    check_outputs(committed, run(committed))


@pytest.mark.parametrize("cell", [0, 1, 2], ids=["number", "whole number", "picture"])
def test_outputs_that_are_not_those_of_the_code_fail_the_check(committed, changed, cell):
    stale = copy.deepcopy(committed)
    stale.cells[cell] = changed.cells[cell]
    with pytest.raises(AssertionError, match=f"cell {cell} "):
        check_outputs(committed, stale)


@pytest.mark.parametrize("missing", ["in the file", "in the run"])
def test_outputs_that_are_missing_fail_the_check(committed, missing):
    cleared = copy.deepcopy(committed)
    cleared.cells[1].outputs = []
    pair = (cleared, committed) if missing == "in the file" else (committed, cleared)
    with pytest.raises(AssertionError, match="cell 1 shows"):
        check_outputs(*pair)


def test_numbers_may_differ_by_two_units_of_their_last_decimal():
    texts = ["loss 2.31, 8 devices", "loss 2.33, 8 devices", "loss 2.34, 8 devices"]
    assert [same_text(texts[0], text) for text in texts] == [True, True, False]
    assert not same_text("8 devices", "9 devices")
    assert same_text("1.0e-30", "1.2e-30")
    assert not same_text("1.0e-30", "1.0e-29")
    for one, other in itertools.permutations(["0.0", "nan", "inf"], 2):
        assert not same_text(one, other)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        refresh(pathlib.Path(name))
