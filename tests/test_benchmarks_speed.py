"""`python -m benchmarks speed`: what it measures, writes and refuses. Never how fast it was."""

import json
import re

import matplotlib.image
import pytest

from benchmarks.__main__ import main
from benchmarks.commands.speed import SCOPES


def test_a_run_times_every_contender_and_writes_what_it_found(tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["speed", "--model", "1M", "--rounds", "5", "--out", str(out)]) == 0
    written = json.loads((out / "speed.json").read_text())
    rows = written["results"]["1M"]
    names = [name for contenders in SCOPES.values() for name in contenders]
    assert list(rows) == names
    firsts = {next(iter(contenders)) for contenders in SCOPES.values()}
    for name, row in rows.items():
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert (row["ratio"]["low"] == row["ratio"]["high"] == 1) or name not in firsts
        assert 0.9e6 < row["parameters"] < 1.2e6
        # Old versions of XLA hold a leaf's squares; nobody holds more.
        naive = rows[next(iter(SCOPES[row["scope"]]))]
        assert row["temporary_bytes"] < naive["temporary_bytes"] + 1e6
    said = capsys.readouterr().out
    assert "unit_scale()" in said
    assert re.sub(r"\s", "", str(out / "speed.png")) in re.sub(r"\s", "", said)
    assert min(matplotlib.image.imread(out / "speed.png").shape[:2]) > 300


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--model", "7B"], "argument --model: invalid choice: '7B'"),
        (["--rounds", "1"], "argument --rounds: expected a whole number of 5 or more, got '1'"),
        (["--out", __file__], "argument --out: cannot use "),
    ],
)
def test_a_wrong_value_is_answered_by_one_line(options, answer, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["speed", *options])
    said = capsys.readouterr().err
    assert said.startswith(f"python -m benchmarks speed: {answer}")
    assert said.count("\n") == 1
