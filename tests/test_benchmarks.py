"""The command line of the benchmarks: what it writes, refuses, and survives."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks import data, tasks
from benchmarks.__main__ import main
from benchmarks.models.gpt import GPTConfig
from benchmarks.optimizers import SHOWN
from benchmarks.runs import Log
from benchmarks.tasks import language_modelling
from benchmarks.training import loop, report

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 8
STRICT = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
SMALL = ["--steps", str(STEPS), "--batch-size", "2", "--checkpoint-every", "2"]


def steps_of(out: pathlib.Path, optimizer: str) -> list[dict]:
    return Log(out / "metrics.jsonl").of("step", optimizer)


def start(out: pathlib.Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "train", *SMALL]
    return subprocess.Popen(
        [*command, "--optimizer", "unit_scale", "--out", str(out), *options],
        cwd=ROOT,
        env=os.environ | STRICT,
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
    check_quiet(said)
    return out


def check_quiet(said: str) -> None:
    """Nothing but what the command means to say: no warnings, no libraries' logs."""
    for noise in ("Warning", "WARNING", "Traceback", "INFO", "absl"):
        assert noise not in said


def test_a_run_logs_every_step_of_every_optimizer_and_its_origin(finished):
    log = Log(finished / "metrics.jsonl")
    for name in ("unit_scale", "sgd"):
        (run,) = log.of("run", name)
        assert run["data_sha256"] == language_modelling.load().fingerprint
        assert run["versions"]["jax"] == jax.__version__
        steps = log.of("step", name)
        assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
        assert all(e["norms"]["blocks/layers/0/attention/query/kernel"] > 0 for e in steps)
        assert [e["step"] for e in log.of("evaluation", name)] == list(range(1, STEPS + 1))
        assert len(log.of("sample", name)) == 1
        (result,) = log.of("result", name)
        assert result["validation"] == log.of("evaluation", name)[-1]["value"]
        assert len({result[split] for split in ("train", "validation", "test")}) == 3
    assert steps_of(finished, "unit_scale")[0]["loss"] == steps_of(finished, "sgd")[0]["loss"]


def test_a_run_that_diverges_is_logged_and_shown_as_such(tmp_path, capsys):
    options = ["--steps", "4", "--batch-size", "2", "--learning-rate", "1e30"]
    assert main(["train", *options, "--optimizer", "sgd", "--out", str(tmp_path)]) == 0
    assert "never" in capsys.readouterr().out

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    entries = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    losses = [e["loss"] for e in entries if e["kind"] == "step"]
    assert losses[0] > 0
    assert losses[-1] is None
    assert (tmp_path / "gradient_norms.png").exists()


def test_the_preset_for_accelerators_trains_the_larger_model(tmp_path, monkeypatch):
    # As large would take minutes: a model of one block, not two.
    large = GPTConfig(vocabulary=256, context=16, depth=1, heads=2, width=16)
    monkeypatch.setattr(language_modelling, "LARGE", large)
    options = ["--preset", "accelerator", "--optimizer", "unit_scale", "--out", str(tmp_path)]
    assert main(["train", "--steps", "2", "--batch-size", "2", *options]) == 0
    (run,) = Log(tmp_path / "metrics.jsonl").of("run", "unit_scale")
    assert (run["preset"], run["steps"]) == ("accelerator", 2)
    blocks = {name[:15] for name in steps_of(tmp_path, "unit_scale")[0]["norms"] if "block" in name}
    assert blocks == {"blocks/layers/0"}


def test_unit_scale_learns_within_eight_steps(finished):
    losses = [e["loss"] for e in steps_of(finished, "unit_scale")]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_the_closing_line_says_who_came_first_and_by_how_much(finished):
    log, task = Log(finished / "metrics.jsonl"), language_modelling.load()
    names = ["unit_scale", "sgd"]
    tests = {name: log.of("result", name)[0]["test"] for name in names}
    first, second = sorted(tests, key=tests.__getitem__)  # Bits: fewer are better.
    said = report.verdict(log, names, task)
    places = [said.index(x) for x in (first, f"{tests[first]:.3g}", f"{tests[second]:.3g}", second)]
    assert places == sorted(places)
    other = report.verdict(log, names, dataclasses.replace(task, higher_is_better=True))
    assert other.startswith(second)
    assert report.verdict(log, ["sgd"], task) == ""


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
    assert "has seed 0, not 1; repeat its options" in error
    assert error.count("\n") == 1


def test_resume_refuses_other_data_than_the_saved(tmp_path, capsys):
    config = loop.Config("language_modelling", "cpu", "0", "sgd", 0.1, STEPS, 2, 0)
    Log(tmp_path / "metrics.jsonl").append(**loop.describe(config))
    with pytest.raises(SystemExit, match="2"):
        main(["train", *SMALL, "--optimizer", "sgd", "--out", str(tmp_path), "--resume"])
    assert "has data_sha256 0, not " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: expected a whole number from 1 to 1000000000, got"),
        (["--steps", "many"], "--steps: expected a whole number from 1 to 1000000000, got 'many'"),
        (["--steps", "1" + 22 * "0"], "argument --steps: expected a whole number from 1 to"),
        (["--batch-size", "-3"], "argument --batch-size: expected a whole number from 1 to"),
        (["--seed", "4294967296"], "4294967295, got '4294967296'"),
        (["--seed", "x"], "argument --seed: expected a whole number from 0 to 4294967295"),
        (["--learning-rate", "fast"], "argument --learning-rate: invalid float value: 'fast'"),
        (["--checkpoint-every", "0"], "argument --checkpoint-every: expected a whole number"),
        (["--task", "chess"], "argument --task: invalid choice: 'chess'"),
        (["--optimizer", "magic"], "argument --optimizer: invalid choice: 'magic'"),
        (["--out", "/dev/null/run"], "argument --out: cannot use /dev/null/run"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
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
    for name in (*SHOWN, "--checkpoint-every", "--resume", data.FOLDER_VARIABLE):
        assert name in text
    for name in tasks.TASKS:
        assert tasks.summary(name) in text
        assert len(tasks.summary(name)) > 20


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


def test_a_run_that_was_killed_and_then_stopped_ends_in_the_same_bits(finished, tmp_path):
    out = tmp_path / "run"
    folder = out / "checkpoints" / "unit_scale"
    # Killed as the first checkpoint begins to be written; Ctrl-C after the second.
    writing = start(out, "--resume")
    while writing.poll() is None and not any(folder.glob("2*")):
        time.sleep(0.0005)
    writing.kill()
    writing.communicate(timeout=120)
    assert writing.returncode == -signal.SIGKILL
    interrupted = start(out, "--resume")
    said = stop_after(interrupted, folder / "4" / "_CHECKPOINT_METADATA", signal.SIGINT)
    assert interrupted.returncode == 130, said
    assert "Stopped. To go on, where there is --resume, repeat the command with it." in said
    last = start(out, "--resume")
    said = last.communicate(timeout=120)[0]
    assert last.returncode == 0, said
    check_quiet(said)
    steps = steps_of(out, "unit_scale")
    assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
    assert [e["loss"] for e in steps] == [e["loss"] for e in steps_of(finished, "unit_scale")]
    assert len(parameters(out)) == len(parameters(finished)) > 30
    for resumed, straight in zip(parameters(out), parameters(finished), strict=True):
        np.testing.assert_array_equal(resumed, straight)


def test_half_a_line_at_the_end_of_the_log_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "sample", "optimizer": "sgd", "text": "a"}) + '\n{"kind')
    log = Log(path)
    assert [e["text"] for e in log.entries] == ["a"]
    log.keep(lambda e: True)
    log.append(kind="sample", optimizer="sgd", text="b")
    assert [e["text"] for e in Log(path).entries] == ["a", "b"]
