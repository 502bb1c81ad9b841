"""The README's Python runs, and its figures are what its subject does."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_unitscale import unit_scale

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| (\w+) \| ([\d.e+-]+) \| (\S+) \| (\S+) \| (\S+) \|$", README, re.MULTILINE)

BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_each_python_block_runs(block):
    names = {}
    exec(block, names)
    trained = names.get("model") if "nnx" in names else names["state"].params
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(trained))


def test_both_flax_interfaces_are_shown():
    assert [re.findall("nnx|linen", block)[0] for block in BLOCKS] == ["nnx", "linen"]


def test_the_table_of_magnitudes_is_there():
    assert len(ROWS) == 11


@pytest.mark.parametrize(("dtype", "element", "peer", "naive", "ours"), ROWS)
def test_each_row_of_the_table_holds(dtype, element, peer, naive, ours):
    x = jnp.full((1000,), float(element), dtype)
    state = optax.EmptyState()
    results = [
        optax.normalize_by_update_norm().update(x, state)[0],
        x / jnp.linalg.norm(x),
        unit_scale().update(x, state)[0],
    ]
    lengths = [float(np.linalg.norm(np.asarray(result, np.float64))) for result in results]
    assert [f"{length:.3g}" for length in lengths] == [peer, naive, ours]


def test_the_language_modelling_results_are_those_of_the_file():
    file = ROOT / "benchmarks/results/cpu-2-cores/language_modelling_learning_rates.json"
    runs = json.loads(file.read_text())["results_of_each_seed_at_the_best_rate"]
    spread = {name: f"{min(run):.2f} to {max(run):.2f}" for name, run in runs.items()}
    sentence = (
        f"AdamW {spread['adamw']}, clipping {spread['clip']}, `unit_scale` {spread['unit_scale']}, "
        f"momentum SGD {spread['sgd']}"
    )
    assert sentence in " ".join(README.split())
