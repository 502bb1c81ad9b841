"""`python -m benchmarks speed`: what it measures, writes and refuses. Never how fast it was."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

from benchmarks.__main__ import main
from benchmarks.models.gpt import GPTConfig
from benchmarks.timing import parts, trees
from benchmarks.timing.measurement import Timed, compile_function, summarize
from benchmarks.timing.methods import SCOPES
from benchmarks.timing.parts import PARTS

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
TINY = GPTConfig(vocabulary=32, context=8, depth=1, heads=2, width=16)
# Embeddings and head; of the block two norms, attention, and two layers with biases; the last norm.
PARAMETERS = 32 * 16 * 2 + 32 + 8 * 16 + (4 * 16 + 4 * 16**2 + 8 * 16**2 + 5 * 16) + 2 * 16


@pytest.fixture(scope="module")
def tiny() -> Iterator[list[str]]:
    """Options for small runs."""
    # Optax's Muon adds numbers of several dtypes.
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setitem(trees.MODELS, "tiny", TINY)
        patch.setattr(parts, "LEAVES", (10, 30))
        patch.setattr(parts, "SIZES", ((1, 16),))
        yield ["--model", "tiny", "--train", "tiny", "--rounds", "5"]


@pytest.fixture(scope="module")
def out(tiny, tmp_path_factory) -> pathlib.Path:
    """The folder of a run of all parts in float32."""
    out = tmp_path_factory.mktemp("speed") / "new"
    assert main(["speed", *tiny, "--dtype", "float32", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(out) -> dict[str, list[dict]]:
    """The rows of every part."""
    written = json.loads((out / "speed.json").read_text())["results"]
    assert list(written) == list(PARTS)
    return written


def found(rows: list[dict], scope: str) -> list[str]:
    """The names in a scope."""
    return [row["name"] for row in rows if row["scope"] == scope]


def test_a_run_writes_its_rows_and_a_figure_that_shows_something(out):
    assert sorted(path.name for path in out.iterdir()) == ["ratios.png", "speed.json"]
    image = matplotlib.image.imread(out / "ratios.png")[..., :3]
    assert min(image.shape[:2]) > 300
    # Coloured marks, not just black axes on white.
    assert np.mean(np.ptp(image, axis=-1) > 0.2) > 5e-4


def test_every_method_is_timed_beside_the_ceilings(results):
    rows = results["transformation"]
    for scope, methods in SCOPES.items():
        assert found(rows, scope) == list(methods)
    places = ("same leaves", "one array")
    ceilings = [f"{name}, {place}" for place in places for name in ("read", "copy")]
    assert found(rows, "ceiling") == ceilings
    assert {row["parameters"] for row in rows} == {PARAMETERS}


def test_growth_has_a_row_for_each_number_of_leaves(results):
    assert [row["leaves"] for row in results["leaves"]] == [10] * 4 + [30] * 4
    assert all(row["compile_seconds"] > 0 for row in results["leaves"])


def test_times_are_positive_and_the_first_of_each_scope_is_the_measure(results):
    for rows in results.values():
        firsts = {}
        for row in rows:
            assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
            assert 0 < row["ratio"]["low"] <= row["ratio"]["high"]
            firsts.setdefault((row["scope"], row.get("leaves")), row)
        for row in firsts.values():
            assert row["ratio"] == {"median": 1, "low": 1, "high": 1}


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_compared_computes_the_same(scope, tiny):
    shapes = trees.gpt("tiny", "bfloat16")
    updates = trees.fill(shapes)
    naive, ours = (method.update for method in list(SCOPES[scope].values())[:2])
    state = optax.EmptyState()
    wanted, got = (jax.jit(update)(updates, state)[0] for update in (naive, ours))
    for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16
        # Each rounds once, to 8 bits.
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=2.0**-7)


def test_a_result_that_takes_a_donated_argument_is_no_memory_and_another_is():
    x = jnp.ones(1000)
    _, donated = compile_function(lambda x: x * 2, x, donate=(0,))
    _, kept = compile_function(lambda x: x * 2, x)
    assert donated["temporary_bytes"] < 100
    assert 4000 <= kept["temporary_bytes"] < 4100


def test_ratios_are_taken_round_by_round():
    contenders = [
        Timed("first", "leaf", print),
        Timed("second", "leaf", print, {"leaves": 7}),
        Timed("other scope", "global", print),
    ]
    times = [[4, 8, 12], [8, 4, 6], [3, 3, 3]]
    rows = {row["name"]: row for row in summarize(contenders, np.array(times, float))}
    assert rows["second"]["ratio"] == {"median": 0.5, "low": 0.5, "high": 1.25}
    assert rows["other scope"]["ratio"]["median"] == 1
    assert rows["second"]["leaves"] == 7


def test_leaves_have_equal_numbers_of_parameters_together():
    for count in parts.LEAVES:
        shapes = trees.leaves(count)
        assert len(shapes) == count
        assert abs(trees.parameters(shapes) / 4e6 - 1) < 0.01


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "speed", "--part", "leaves", "--rounds", "100"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    written = tmp_path / "speed.json"
    while not written.exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    rows = json.loads(written.read_text())["results"]["leaves"]
    assert 0 < len(rows) < 4 * len(parts.LEAVES)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--model", "7B"], "argument --model: invalid choice: '7B'"),
        (["--part", "all"], "argument --part: invalid choice: 'all'"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--rounds", "1"], "argument --rounds: expected a whole number from 5 to 1000000000"),
        (["--out", __file__], "argument --out: cannot use "),
    ],
)
def test_a_wrong_value_is_answered_by_one_line(options, answer, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["speed", *options])
    said = capsys.readouterr().err
    assert said.startswith(f"python -m benchmarks speed: {answer}")
    assert said.count("\n") == 1
