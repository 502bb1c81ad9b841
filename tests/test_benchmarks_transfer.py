"""`python -m benchmarks transfer`: the search, the sizes, and what a sweep writes."""

import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import __main__
from benchmarks.optimizers import BASE_FAN_IN, CONTENDERS, TRANSFERRED
from benchmarks.sweep import sizes
from benchmarks.sweep.search import SEEDS, find, rate_of
from benchmarks.sweep.sizes import FAMILIES
from benchmarks.sweep.trial import Trial
from optax_unitscale import layers_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("best", [-17, -6, -5, -2, -1, 0, 1, 3, 9, 14])
def test_the_search_ends_at_the_best_index_and_looks_at_few(best):
    asked = []

    def loss(index, seed):
        asked.append((index, seed))
        return 1.0 + 0.01 * (index - best) ** 2 + 0.001 * seed

    assert find(loss, start=-2) == best
    assert len(set(asked)) <= 20
    assert {(best - 1, 1), (best, 1), (best + 1, 1)} <= set(asked)


def test_the_search_leaves_runs_that_diverged_behind():
    assert find(lambda i, _: math.inf if i > -9 else (i + 12) ** 2.0, start=0) == -12


def test_the_second_seed_can_move_the_best():
    losses = {0: lambda i: (i - 4.0) ** 2, 1: lambda i: 3 * (i - 6.0) ** 2}
    # Of the sum, 4 i² - 44 i + ..., the least is at 5.5.
    assert find(lambda i, seed: losses[seed](i), start=4) in (5, 6)


def test_rates_are_factors_of_root_two_apart():
    assert [rate_of(i) for i in (-2, -1, 0, 1, 2)] == [0.5, 0.7071, 1.0, 1.414, 2.0]


def test_the_best_rate_counts_only_where_every_seed_ran():
    def at(rate, seed, loss):
        return Trial("sgd", rate, seed, [4.0, loss], {}, 0.5)

    trials = [at(0.1, 0, 1.0), at(0.1, 1, 3.0), at(0.2, 0, 1.5), at(0.2, 1, 1.7), at(0.4, 0, 0.1)]
    assert sizes.best(trials) == (0.2, 1.6, pytest.approx(0.2))
    assert sizes.best(trials[-1:]) is None
    # Twice what it began with is a run that diverged.
    assert at(0.1, 0, 9.0).loss == math.inf


@pytest.mark.parametrize("name", FAMILIES)
def test_members_differ_in_the_size_they_are_named_for(name):
    family = FAMILIES[name]
    members = [family.member(size, 1.0) for size in family.sizes[:2]]
    models: list[Any] = [member.task.model(0) for member in members]
    kernels = [max(x.shape) for model in models for x in jax.tree.leaves(nnx.state(model))]
    counts = [sum(x.size for x in jax.tree.leaves(nnx.state(model))) for model in models]
    ratio = family.sizes[1] / family.sizes[0]
    if name.endswith("width"):
        assert counts[1] > 1.5 * counts[0]
        assert all(size in kernels for size in family.sizes[:2])
    elif name.endswith("depth"):
        blocks = [len(model.blocks.layers) for model in models]
        assert blocks == list(family.sizes[:2])
    else:
        assert counts[0] == counts[1]
        changed = "batch_size" if name.endswith("batch") else "steps"
        first, second = (getattr(member, changed) for member in members)
        assert second == ratio * first


def test_the_width_rule_divides_the_rate_of_kernels_and_of_nothing_else():
    def step(name: str, width: int) -> Any:
        params = {
            "tokens": {"embedding": jnp.ones((5, width))},
            "up": {"kernel": jnp.ones((width, 3)), "bias": jnp.ones(3)},
        }
        gradients = jax.tree.map(lambda x: 0.5 * x, params)
        optimizer = CONTENDERS[name].make(0.25, layers_of(params))
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    for factor in (1, 2, 8):
        width = factor * BASE_FAN_IN
        # Optax's Adam mixes an integer count with floats.
        with jax.numpy_dtype_promotion("standard"):
            ours, plain = step("adamw_width", width), step("adamw", width)
        ratios = jax.tree.map(lambda x, y: float((x / y).mean()), ours, plain)
        assert ratios["up"]["kernel"] == pytest.approx(1 / factor, rel=1e-5)
        assert ratios["up"]["bias"] == pytest.approx(1, rel=1e-5)
        assert ratios["tokens"]["embedding"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("size", [3.0, 1e-30])
def test_muon_matched_takes_steps_as_long_as_those_of_unit_muon(size):
    gradients = {"kernel": jnp.full((16, 64), size), "bias": jnp.full(64, size)}
    gradients["embedding"] = jnp.zeros((5, 64)).at[:2].set(size)
    lengths = []
    for name in ("muon_matched", "unit_muon"):
        optimizer = CONTENDERS[name].make(0.5, layers_of(gradients))
        with jax.numpy_dtype_promotion("standard"):
            updates: Any = optimizer.update(gradients, optimizer.init(gradients))[0]
        lengths.append({key: float(np.linalg.norm(x)) for key, x in updates.items()})
    matched, ours = lengths
    assert matched["bias"] == pytest.approx(ours["bias"], rel=1e-5)
    assert matched["embedding"] == pytest.approx(ours["embedding"], rel=1e-5)
    # Newton and Schulz's five steps end between 0.7 and 1.2; Muon adds 1e-8 to the norm.
    if size > 1:
        assert matched["kernel"] == pytest.approx(ours["kernel"], rel=0.31)


def test_a_sweep_writes_tables_figures_and_results_and_repeats_nothing(tmp_path, capsys):
    command = ["transfer", "--family", "mlp_width", "--preset", "try", "--workers", "2"]
    # Which has neither of the sizes.
    command += ["--family", "gpt_depth"]
    both = ["--size", "64", "--size", "256"]
    only = ["--optimizer", "unit_scale_global", "--out", str(tmp_path)]
    assert __main__.main([*command, *both, *only]) == 0
    text = capsys.readouterr().out
    assert re.search(r"unit_scale_global +[\d.]+, [\d.]+", text)
    assert not (tmp_path / "gpt_depth.jsonl").exists()
    before = (tmp_path / "mlp_width.jsonl").read_text()
    found = json.loads((tmp_path / "transfer.json").read_text())["mlp_width"]["unit_scale_global"]
    assert set(found) == {"64", "256"}
    entries = [json.loads(line) for line in before.splitlines()[1:]]
    for size, best in found.items():
        losses = [
            entry["losses"][-1]
            for entry in entries
            if (entry["size"], entry["learning_rate"]) == (int(size), best["learning_rate"])
        ]
        assert len(losses) == SEEDS
        assert best["loss"] == pytest.approx(np.mean(losses))
    assert (tmp_path / "mlp_width.png").stat().st_size > 10_000
    rates = [best["learning_rate"] for best in found.values()]
    cell = f"{max(rates) / min(rates):.1f}, {found['256']['loss']:.3g}"
    assert (tmp_path / "transfer.md").read_text() == (
        "| optimizer | mlp width 64 to 256 |\n| --- | --- |\n"
        + f"| `unit_scale_global` | {cell} |\n"
    )
    assert __main__.main([*command, *both, *only, "--resume"]) == 0
    assert (tmp_path / "mlp_width.jsonl").read_text() == before


def test_a_size_that_no_member_has_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["transfer", "--family", "mlp_width", "--size", "7"])
    assert "argument --size: invalid choice: 7 (choose from 2, 4, 8, " in capsys.readouterr().err


def test_the_table_says_how_far_a_rate_moves_and_where_it_ends():
    def at(rate, loss):
        return {"learning_rate": rate, "loss": loss, "range": 0.1}

    results = {
        "mlp_width": {"muon": {"64": at(0.1, 0.3)}, "adam": {"64": at(0.2, 1.5)}},
        "gpt_width": {"adam": {"32": at(0.1, 4.0), "128": at(0.4, 3.1234), "64": at(0.05, 5.0)}},
    }
    results["mlp_width"]["adam"]["256"] = at(0.1, 1.25)
    assert sizes.moves(results).splitlines() == [
        "| optimizer | gpt width 32 to 128 | mlp width 64 to 256 |",
        "| --- | --- | --- |",
        "| `adam` | 8.0, 3.12 | 2.0, 1.25 |",
        "| `muon` | - | 1.0, 0.3 (to 64) |",
    ]


def test_every_optimizer_that_is_transferred_is_a_contender():
    assert set(TRANSFERRED) <= set(CONTENDERS)
