"""`python -m benchmarks lower` where the compilers are installed."""

import json

import pytest

from benchmarks.__main__ import main

pytest.importorskip("libtpu", reason="needs the extra aot")
pytest.importorskip("jax_cuda13_plugin", reason="needs the extra aot")

TOPOLOGIES = ["H100, 256 GPUs"]
METHODS = ["unit_scale()", "optax.clip_by_global_norm(1)"]


def test_it_writes_and_shows_what_it_compiled(tmp_path, capsys):
    options = [part for name in TOPOLOGIES for part in ("--topology", name)]
    options += [part for name in METHODS for part in ("--method", name)]
    assert main(["lower", *options, "--out", str(tmp_path / "new")]) == 0
    written = json.loads((tmp_path / "new" / "lower.json").read_text())
    assert written["versions"]["libtpu"]
    for topology in TOPOLOGIES:
        rows = written["results"][topology]
        assert list(rows) == METHODS
        for row in rows.values():
            assert list(row["collectives"]) == ["all-reduce"]
            assert row["reused_bytes"] == row["gradient_bytes"] == 60620800
            assert row["compile_seconds"] > 0
    said = capsys.readouterr().out
    for text in (*TOPOLOGIES, "unit_scale()", "clip_by_global_norm(1)", "60.6 MB a device"):
        assert text in said


def test_out_that_is_a_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["lower", "--out", str(tmp_path / "file")])
    said = capsys.readouterr().err
    assert said.startswith("python -m benchmarks lower: argument --out: cannot use")
    assert said.count("\n") == 1
