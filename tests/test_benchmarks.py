"""The command line of the benchmarks: what it writes, refuses, and survives."""

import json
import pathlib
import pydoc_data.topics
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from benchmarks.__main__ import main
from benchmarks.models.gpt import GPT, GPTConfig
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.tasks import language_modelling
from benchmarks.training import Log

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12
SMALL = ["--steps", str(STEPS), "--batch-size", "2", "--checkpoint-every", "2"]


def steps_of(out: pathlib.Path, optimizer: str) -> list[dict]:
    return Log(out / "metrics.jsonl").of("step", optimizer)


def start(out: pathlib.Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks", "train", *SMALL, "--optimizer", "unit_scale"]
    return subprocess.Popen(
        [*command, "--out", str(out), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A short run of two optimizers."""
    out = tmp_path_factory.mktemp("finished") / "run"
    process = start(out, "--optimizer", "sgd")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "Warning" not in said
    return out


def test_a_run_logs_every_step_of_every_optimizer_and_its_origin(finished):
    log = Log(finished / "metrics.jsonl")
    for name in ("unit_scale", "sgd"):
        (run,) = log.of("run", name)
        assert run["data_sha256"] == language_modelling.load().fingerprint
        assert run["versions"]["jax"] == jax.__version__
        steps = log.of("step", name)
        assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
        assert all(e["norms"]["blocks/0/attention/query/kernel"] > 0 for e in steps)
        assert [e["step"] for e in log.of("evaluation", name)] == list(range(1, STEPS + 1))
        assert len(log.of("sample", name)) == 1
    assert steps_of(finished, "unit_scale")[0]["loss"] == steps_of(finished, "sgd")[0]["loss"]


def test_unit_scale_learns_within_a_dozen_steps(finished):
    losses = [e["loss"] for e in steps_of(finished, "unit_scale")]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["losses.png", "gradient_norms.png"])
def test_figures_show_something(finished, name):
    image = matplotlib.image.imread(finished / name)
    assert image.shape[0] > 300
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50


def test_a_second_run_does_not_overwrite_the_first(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(["train", *SMALL, "--out", str(finished)])
    assert "holds a run; add --resume" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_other_options_than_the_saved_ones(finished, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", *SMALL, "--seed", "1", "--out", str(finished), "--resume"])
    error = capsys.readouterr().err
    assert "has seed 0 for sgd, not 1; repeat its options" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: expected a whole number of 1 or more, got '0'"),
        (["--steps", "many"], "argument --steps: expected a whole number of 1 or more, got 'many'"),
        (["--batch-size", "-3"], "argument --batch-size: expected a whole number of 1 or more"),
        (["--seed", "x"], "argument --seed: expected a whole number of 0 or more, got 'x'"),
        (["--learning-rate", "nan"], "argument --learning-rate: expected a positive number"),
        (["--learning-rate", "-1"], "argument --learning-rate: expected a positive number"),
        (["--checkpoint-every", "0"], "argument --checkpoint-every: expected a whole number"),
        (["--task", "chess"], "argument --task: invalid choice: 'chess'"),
        (["--optimizer", "magic"], "argument --optimizer: invalid choice: 'magic'"),
        (["--out", "/dev/null/run"], "argument --out: cannot use /dev/null/run"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_value_is_answered_by_one_line_and_status_2(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", *options])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for option in ("task", "steps", "optimizer", "learning-rate", "seed", "batch-size", "out"):
        assert f"--{option}" in text
    for name in (*OPTIMIZERS, "--checkpoint-every", "--resume", "default: 1200"):
        assert name in text


def test_batches_are_a_function_of_seed_and_step():
    batch = language_modelling.load().batch
    np.testing.assert_array_equal(batch(3, 5, 4), batch(3, 5, 4))
    assert not np.array_equal(batch(3, 5, 4), batch(3, 6, 4))
    assert not np.array_equal(batch(3, 5, 4), batch(4, 5, 4))


def test_splits_cover_the_text_and_share_none_of_it():
    parts = language_modelling.splits()
    text = "\n".join(t for _, t in sorted(pydoc_data.topics.topics.items())).encode()
    assert b"".join(parts[name].tobytes() for name in ("train", "validation", "test")) == text
    assert min(len(part) for part in parts.values()) > 10_000


def test_a_later_token_does_not_change_earlier_logits():
    model = GPT(GPTConfig(vocabulary=11, context=8, depth=2, heads=2, width=16), nnx.Rngs(0))
    tokens = jnp.arange(8)[None]
    before, after = model(tokens), model(tokens.at[0, 5].set(9))
    np.testing.assert_array_equal(np.asarray(before)[0, :5], np.asarray(after)[0, :5])
    assert not np.allclose(np.asarray(before)[0, 5:], np.asarray(after)[0, 5:])


def stop_after(process: subprocess.Popen[str], path: pathlib.Path, how: int) -> str:
    """Sends a signal once `path` is there, and waits for the end."""
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(how)
    return process.communicate(timeout=120)[0]


def parameters(out: pathlib.Path) -> list[np.ndarray]:
    with ocp.CheckpointManager((out / "checkpoints" / "unit_scale").absolute()) as manager:
        assert manager.latest_step() == STEPS
        tree = manager.restore(STEPS, args=ocp.args.StandardRestore())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_run_that_was_killed_four_times_ends_in_the_same_bits(finished, tmp_path):
    out = tmp_path / "run"
    folder = out / "checkpoints" / "unit_scale"
    # Before any step; as the first checkpoint begins to be written; after one; by Ctrl-C.
    stop_after(start(out), out, signal.SIGKILL)
    writing = start(out, "--resume")
    while writing.poll() is None and not any(folder.glob("2*")):
        time.sleep(0.0005)
    writing.kill()
    writing.communicate(timeout=120)
    stop_after(start(out, "--resume"), folder / "4" / "_CHECKPOINT_METADATA", signal.SIGKILL)
    interrupted = start(out, "--resume")
    said = stop_after(interrupted, folder / "8" / "_CHECKPOINT_METADATA", signal.SIGINT)
    assert interrupted.returncode == 130, said
    assert "Go on with the same options and --resume" in said
    assert (out / "losses.png").exists()
    last = start(out, "--resume")
    said = last.communicate(timeout=120)[0]
    assert last.returncode == 0, said
    assert "Warning" not in said
    steps = steps_of(out, "unit_scale")
    assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
    assert [e["loss"] for e in steps] == [e["loss"] for e in steps_of(finished, "unit_scale")]
    assert len(parameters(out)) == len(parameters(finished)) > 30
    for resumed, straight in zip(parameters(out), parameters(finished), strict=True):
        np.testing.assert_array_equal(resumed, straight)


def test_half_a_line_at_the_end_of_the_log_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "run", "optimizer": "sgd"}) + '\n{"kind": "st')
    log = Log(path)
    assert [e["kind"] for e in log.entries] == ["run"]
    log.keep(lambda e: True)
    log.append(kind="step", optimizer="sgd")
    assert [e["kind"] for e in Log(path).entries] == ["run", "step"]
