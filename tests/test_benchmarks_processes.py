"""`python -m benchmarks train` over devices and over real processes, one of which may be killed."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.runs import Entry, Log

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12
SMALL = ["--optimizer", "unit_scale", "--steps", str(STEPS), "--batch-size", "8"]
STRICT = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
PATIENCE = 240


def start(out: pathlib.Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "train", *SMALL]
    return subprocess.Popen(
        [*command, "--checkpoint-every", "4", "--out", str(out), *options],
        cwd=ROOT,
        env=os.environ | STRICT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_all(out: pathlib.Path, count: int, *options: str) -> list[subprocess.Popen[str]]:
    """Processes that meet on this machine."""
    where = free_port()
    return [start(out, *member(where, count, k), *options) for k in range(count)]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def member(where: str, count: int, index: int) -> list[str]:
    return ["--coordinator", where, "--processes", str(count), "--process-id", str(index)]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each of them said, once all have ended well."""
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    assert not any("Warning" in text or "Traceback" in text for text in said), said
    return said


def entries(out: pathlib.Path, kind: str) -> list[Entry]:
    return Log(out / "metrics.jsonl").of(kind, "unit_scale")


def check_same_curve(out: pathlib.Path, alone: pathlib.Path) -> None:
    """Every step once, with the losses of one device but for the order of sums."""
    steps = entries(out, "step")
    assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
    losses = [[e["loss"] for e in entries(x, "step")] for x in (out, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    values = [[e["value"] for e in entries(x, "evaluation")] for x in (out, alone)]
    np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """The run of one process on one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    finish([start(out)])
    return out


def test_a_mesh_of_four_devices_gives_the_losses_of_one(alone, tmp_path):
    finish([start(tmp_path / "run", "--mesh", "data=2,fsdp=2")])
    (run,) = entries(tmp_path / "run", "run")
    assert (run["mesh"], run["processes"]) == ({"data": 2, "fsdp": 2}, 1)
    check_same_curve(tmp_path / "run", alone)


def check_written_by(count: int, out: pathlib.Path) -> None:
    """Each process has written what its devices hold, and one of them the sample."""
    last = out / "checkpoints" / "unit_scale" / str(STEPS) / "default"
    names = {path.name for path in last.iterdir()}
    assert {f"ocdbt.process_{k}" for k in range(count)} < names
    assert f"ocdbt.process_{count}" not in names
    (sample,) = entries(out, "sample")
    assert len(sample["text"]) > 50


def test_two_processes_stop_together_go_on_and_give_the_losses_of_one(alone, tmp_path):
    out = tmp_path / "run"
    pair = start_all(out, 2, "--mesh", "data=1,fsdp=4")
    wait_for(out / "checkpoints" / "unit_scale", pair)
    pair[1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=PATIENCE)[0] for process in pair]
    assert [process.returncode for process in pair] == [130, 130], said
    assert "Stopped. Go on with the same options and --resume" in said[0]
    first, second = finish(start_all(out, 2, "--mesh", "data=1,fsdp=4", "--resume"))
    assert "bits per character" in first
    # Which library carries the gradients between processes on CPU: its threads tear their lines.
    gloo = re.compile(r"\[Gloo\]|.*peer ranks")
    assert not [line for line in second.splitlines() if not gloo.match(line)]
    (run,) = entries(out, "run")
    assert (run["mesh"], run["processes"]) == ({"data": 1, "fsdp": 4}, 2)
    check_same_curve(out, alone)
    check_written_by(2, out)


def kill(processes: list[subprocess.Popen[str]], index: int, out: pathlib.Path) -> str:
    """Kills one of two once a checkpoint is there; what the other says as it ends."""
    wait_for(out / "checkpoints" / "unit_scale" / "4" / "_CHECKPOINT_METADATA", processes)
    processes[index].kill()
    died = time.monotonic()
    other = processes[1 - index]
    said = other.communicate(timeout=PATIENCE)[0]
    assert time.monotonic() - died < 60
    # By JAX, which aborts, or because an operation failed before it did.
    assert other.returncode in (1, -signal.SIGABRT), said
    processes[index].communicate(timeout=PATIENCE)
    assert processes[index].returncode == -signal.SIGKILL
    return said


def wait_for(path: pathlib.Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < deadline:
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.01)


@pytest.mark.parametrize(("killed", "others"), [(0, 0), (1, 4)], ids=["first", "second"])
def test_when_one_is_killed_the_other_says_so_within_a_minute_and_four_can_go_on(
    killed, others, alone, tmp_path
):
    out = tmp_path / "run"
    said = kill(start_all(out, 2, "--mesh", "fsdp=2"), killed, out)
    assert "another task died" in said or "another process died" in said
    reached = entries(out, "step")[-1]["step"]
    assert 4 <= reached < STEPS
    if others:
        finish(start_all(out, others, "--resume"))
        check_same_curve(out, alone)
        check_written_by(others, out)


def test_processes_with_different_options_are_refused(tmp_path):
    out, where = tmp_path / "run", free_port()
    pair = [start(out, *member(where, 2, k), "--seed", str(k)) for k in range(2)]
    for process in pair:
        said = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 2, said
        assert "the processes have different options, or see different files in --out" in said


PAIR = ["--coordinator", "localhost:1", "--processes", "2", "--process-id"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "data"], "argument --mesh: expected sizes such as data=2,fsdp=2, got 'data'"),
        (["--mesh", "data=0"], "argument --mesh: expected sizes such as"),
        (["--mesh", "data=2,data=2"], "argument --mesh: expected sizes such as"),
        (["--mesh", "rows=2"], "argument --mesh: expected sizes such as"),
        (["--mesh", "data=3"], "argument --batch-size: 8 cannot be shared out evenly among 3"),
        ([*PAIR, "0"], "argument --coordinator: needs --out, a folder that all processes share"),
        ([*PAIR, "2", "--out", "x"], "argument --process-id: expected 0 to 1, got 2"),
        ([*PAIR, "-1", "--out", "x"], "argument --process-id: expected a whole number"),
        (["--processes", "2"], "argument --processes: needs --coordinator"),
        (["--process-id", "0"], "argument --process-id: needs --coordinator"),
        (["--coordinator", "here", "--out", "x"], "expected HOST:PORT or auto, got 'here'"),
        (["--coordinator", "localhost:1", "--out", "x"], "needs --processes and --process-id"),
        (
            [*PAIR, "0", "--out", "x", "--mesh", "data=1"],
            "argument --mesh: 1 devices cannot be shared out evenly among 2 processes",
        ),
    ],
)
def test_wrong_options_are_answered_by_one_line_and_status_2(
    options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["train", *SMALL, *options])
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not any(tmp_path.iterdir())
