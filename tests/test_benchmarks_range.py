"""`python -m benchmarks range`: what it writes and refuses, and that its recorded figures hold."""

import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.commands.range import DTYPES, METHODS, extents

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
RECORDED = json.loads((ROOT / "benchmarks/results/cpu-2-cores/range.json").read_text())
STRICT = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run's folder and what it said."""
    out = tmp_path_factory.mktemp("range") / "new"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks", "range", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | STRICT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    return out, process.stdout


def test_a_run_writes_a_picture_and_strict_json_and_says_where(finished):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    out, said = finished
    assert min(matplotlib.image.imread(out / "range.png").shape[:2]) > 500
    written = json.loads((out / "range.json").read_text(), parse_constant=refuse)
    assert list(written["norms"]) == list(DTYPES)
    assert all(list(columns) == ["elements", *METHODS] for columns in written["norms"].values())
    assert f"wrote {out / 'range.png'}" in said
    assert f"wrote {out / 'range.json'}" in said


def test_the_table_says_over_which_magnitudes_each_is_right(finished):
    rows = [line.split() for line in finished[1].splitlines()]
    assert ["1e-37", "to", "1e-05", "to", "1e-18", "to", "1e-18", "to", "1e-07", "to"] in [
        [word for word in row if word != "float32"] for row in rows
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_recorded_figures_are_what_the_code_does_now(dtype, method, finished):
    versions = RECORDED["versions"]
    if method != "unit_scale()" and any(
        importlib.metadata.version(name) != versions[name] for name in ("jax", "optax")
    ):
        pytest.skip(f"recorded with jax {versions['jax']} and optax {versions['optax']}")
    recorded, now = (
        x["norms"][dtype] for x in (RECORDED, json.loads((finished[0] / "range.json").read_text()))
    )
    assert now["elements"] == recorded["elements"]
    # The files have four digits.
    norms = [[float(x) for x in each[method]] for each in (now, recorded)]
    np.testing.assert_allclose(*norms, rtol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_scale_has_norm_one_over_the_whole_normal_range(dtype):
    elements, norms = (np.array(RECORDED["norms"][dtype][x]) for x in ("elements", "unit_scale()"))
    tiny = {"float16": 2.0**-14, "float64": 2.0**-1022}.get(dtype, 2.0**-126)
    # Equal elements are all rounded alike: in bfloat16 by half of 2**-7. The file has four digits.
    np.testing.assert_allclose(norms[elements >= tiny], 1, atol=2.0**-8 + 5e-4)


def test_an_extent_is_the_longest_run_that_is_right():
    norms = {"a": [1.0, math.inf, 1.005, 0.995, 0.0], "b": ["nan", 0.0, 0.98, 1.02, 2.0]}
    dtypes = {"float32": {"elements": [0.01, 0.1, 1.0, 10.0, 100.0], **norms}}
    assert extents(dtypes) == [["float32", "1 to 10", "never"]]


def test_out_that_is_a_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["range", "--out", str(tmp_path / "file")])
    said = capsys.readouterr().err
    assert said.startswith("python -m benchmarks range: argument --out: cannot use")
    assert said.count("\n") == 1


def test_an_unknown_option_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["range", "--seed", "1"])
    assert capsys.readouterr().err == ("python -m benchmarks: unrecognized arguments: --seed 1\n")


def test_help_says_what_the_command_does(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["range", "--help"])
    said = capsys.readouterr().out
    assert "Shows at which magnitudes" in said
    assert "--out DIR" in said
