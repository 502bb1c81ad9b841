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
from benchmarks.timing import parts, pytorch, trees
from benchmarks.timing.measurement import Timed, compile_function, summarize
from benchmarks.timing.methods import SCOPES, STEPS
from benchmarks.timing.parts import PARTS, plan

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
        patch.setattr(parts, "GROUPS", (1, 64))
        patch.setattr(parts, "SIZES", ((1, 16),))
        yield ["--model", "tiny", "--train", "tiny", "--most-leaves", "10", "--rounds", "5"]


@pytest.fixture(scope="module")
def out(tiny, tmp_path_factory) -> pathlib.Path:
    """The folder of a run of all parts but the optimizer's step, in float32."""
    out = tmp_path_factory.mktemp("speed") / "new"
    options = [option for part in PARTS if part != "step" for option in ("--part", part)]
    assert main(["speed", *tiny, "--dtype", "float32", *options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(out, tiny, tmp_path_factory) -> dict[str, list[dict]]:
    """The rows of every part, those of the step in bfloat16."""
    other = tmp_path_factory.mktemp("step")
    options = ["--part", "step", "--dtype", "bfloat16", "--out", str(other)]
    assert main(["speed", *tiny, *options]) == 0
    assert not (other / "growth.png").exists()
    written = [json.loads((x / "speed.json").read_text())["results"] for x in (out, other)]
    assert [list(x) for x in written] == [[part for part in PARTS if part != "step"], ["step"]]
    return written[0] | written[1]


def found(rows: list[dict], scope: str) -> list[str]:
    """The names in a scope, without those that need PyTorch."""
    names = [row["name"] for row in rows if row["scope"] == scope]
    return [name for name in names if not name.startswith("torch")]


def test_a_run_writes_its_rows_and_two_figures_that_show_something(out):
    pictures = ["growth.png", "ratios.png", "speed.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*pictures, ".lock", "speed.json"])
    for name in pictures:
        image = matplotlib.image.imread(out / name)[..., :3]
        assert min(image.shape[:2]) > 300
        # Coloured lines, not just black axes on white.
        assert np.mean(np.ptp(image, axis=-1) > 0.2) > 5e-4


def test_every_method_is_timed_beside_the_ceilings(results):
    for scope, methods in SCOPES.items():
        assert found(results["transformation"], scope) == list(methods)
    assert found(results["step"], "step") == list(STEPS)
    for part in ("transformation", "step"):
        ceilings = [row["passes"] for row in results[part] if row["scope"] == "ceiling"]
        assert ceilings == [["read"], ["copy"], ["triad"]] * 2


def test_pytorch_is_timed_where_it_is_installed(results):
    rows = [row for part in ("transformation", "step") for row in results[part]]
    scopes = {row["scope"] for row in rows if row["name"].startswith("torch")}
    assert scopes == ({"leaf", "global", "step"} if pytorch.INSTALLED else set())


def test_growth_has_a_row_for_each_number_of_leaves_and_groups(results):
    assert {row["leaves"] for row in results["leaves"]} == {10}
    assert [row["groups"] for row in results["groups"]] == [1] * 4 + [64] * 4
    for part in ("leaves", "groups"):
        assert all(row["compile_seconds"] > 0 for row in results[part])


def test_times_are_positive_and_the_first_of_each_scope_is_the_measure(results):
    for part, rows in results.items():
        firsts = {}
        for row in rows:
            assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
            if row["scope"] != "ceiling":
                key = [row.get(x) for x in ("dtype", "scope", "leaves", "groups")]
                firsts.setdefault(str(key), row)
                assert 0 < row["ratio"]["low"] <= row["ratio"]["high"]
        assert firsts, part
        for row in firsts.values():
            assert row["ratio"] == {"median": 1, "low": 1, "high": 1}


def test_bytes_are_those_of_the_passes_over_the_gradient(results):
    passes = {
        ("leaf", "unit_scale()"): 3,
        ("leaf", "optax.adaptive_grad_clip(0.01)"): 4,
        ("global", 'unit_scale(scope="global")'): 3,
        ("axis", "unit_scale(axis=...)"): 3,
        ("ceiling", "read, same leaves"): 1,
        ("ceiling", "copy, one array"): 2,
    }
    rows = results["transformation"]
    bytes_of = {(row["scope"], row["name"]): row["bytes"] for row in rows}
    assert {row["parameters"] for row in rows} == {PARAMETERS}
    assert {key: bytes_of[key] for key in passes} == {
        key: 4 * PARAMETERS * count for key, count in passes.items()
    }


def test_in_bfloat16_they_are_half_and_a_step_reads_and_writes_the_parameters_too(results):
    bytes_of = {row["name"]: row["bytes"] for row in results["step"]}
    assert bytes_of["sgd"] == 2 * PARAMETERS * 3
    assert bytes_of["unit_scale(), sgd"] == 2 * PARAMETERS * 4


def test_without_options_everything_is_measured():
    jobs = plan(list(PARTS), ["1M"], ["float32"], 5, 1000, "1M")
    assert list(dict.fromkeys(job.part for job in jobs)) == list(PARTS)
    assert [job.title for job in jobs if job.part == "leaves"][-1] == "leaves 1000"


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_compared_computes_the_same(scope, tiny):
    shapes = trees.gpt("tiny", "bfloat16")
    updates = trees.fill(trees.stack_blocks(shapes) if scope == "axis" else shapes)
    naive, ours = (method.change.update for method in list(SCOPES[scope].values())[:2])
    state = optax.EmptyState()
    wanted, got = (jax.jit(update)(updates, state)[0] for update in (naive, ours))
    for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16
        # Each rounds once, to 8 bits.
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=2.0**-7)


def test_a_result_that_takes_a_donated_argument_is_no_memory_and_another_is():
    x = jnp.ones(1000)
    _, donated = compile_function(lambda x: x * 2, x, donate=0)
    _, kept = compile_function(lambda x: x * 2, x)
    assert donated["temporary_bytes"] < 100
    assert 4000 <= kept["temporary_bytes"] < 4100


def test_ratio_and_share_are_taken_round_by_round():
    contenders = [
        Timed("slow read", "ceiling", print, ("read",)),
        Timed("read", "ceiling", print, ("read",)),
        Timed("copy", "ceiling", print, ("copy",)),
        Timed("first", "leaf", print, ("read", "copy")),
        Timed("other scope", "global", print, ("read", "copy")),
        Timed("second", "leaf", print, ("read",), {"leaves": 7}),
    ]
    times = [[9, 9, 9], [1, 2, 3], [2, 4, 6], [4, 8, 12], [3, 3, 3], [8, 4, 6]]
    rows = {row["name"]: row for row in summarize(contenders, np.array(times, float), 100)}
    assert list(rows)[3:] == ["first", "second", "other scope"]
    assert rows["second"]["ratio"] == {"median": 0.5, "low": 0.5, "high": 1.25}
    assert rows["first"]["share"] == {"median": 0.75, "low": 0.75, "high": 0.75}
    assert rows["second"]["share"] == {"median": 0.5, "low": 0.3125, "high": 0.5}
    assert (rows["first"]["bytes"], rows["second"]["bytes"]) == (300, 100)
    assert rows["other scope"]["ratio"]["median"] == 1
    assert rows["second"]["leaves"] == 7


def test_leaves_have_equal_numbers_of_parameters_together():
    for count in parts.LEAVES:
        shapes = trees.leaves(count)
        assert len(shapes) == count
        assert abs(trees.parameters(shapes) / 4e6 - 1) < 0.01


def test_stacked_blocks_and_labels_are_those_of_the_gpt():
    shapes = trees.gpt("1M", "bfloat16")
    assert trees.parameters(trees.stack_blocks(shapes)) == trees.parameters(shapes)
    labels = set(jax.tree.leaves(trees.block_labels(shapes)))
    blocks = {f"blocks/layers/{i}" for i in range(trees.MODELS["1M"].depth)}
    assert labels == blocks | {"head", "norm", "positions", "tokens"}


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "speed", "--part", "groups", "--rounds", "100"]
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
    rows = json.loads(written.read_text())["results"]["groups"]
    assert 0 < len(rows) < 4 * len(parts.GROUPS)
    assert (tmp_path / "growth.png").exists()
    assert "unit_scale(axis=1)" in said


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--model", "7B"], "argument --model: invalid choice: '7B'"),
        (["--part", "all"], "argument --part: invalid choice: 'all'"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--rounds", "1"], "argument --rounds: expected a whole number from 5 to 1000000000"),
        (["--most-leaves", "1"], "argument --most-leaves: expected a whole number from 10 to 5000"),
        (["--out", __file__], "argument --out: cannot use "),
    ],
)
def test_a_wrong_value_is_answered_by_one_line(options, answer, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["speed", *options])
    said = capsys.readouterr().err
    assert said.startswith(f"python -m benchmarks speed: {answer}")
    assert said.count("\n") == 1
