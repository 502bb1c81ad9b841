"""The README's Python runs, and its figures are what its subject does."""

import ast
import itertools
import json
import pathlib
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.commands.range import METHODS, extent
from benchmarks.optimizers import COMPARED, CONTENDERS, ORTHOGONAL, TRANSFERRED
from benchmarks.sweep import moves, verdicts
from benchmarks.sweep.families import FAMILIES

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS[:2])
def test_each_block_that_trains_runs(block):
    names = {}
    exec(block, names)
    trained = names.get("model") if "nnx" in names else names["state"].params
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(trained))


def test_both_flax_interfaces_are_shown():
    assert [re.findall("nnx|linen", block)[0] for block in BLOCKS[:2]] == ["nnx", "linen"]


@pytest.mark.parametrize(
    ("block", "contender", "rate"),
    [(2, "unit_scale_spectral", 0.01), (3, "unit_scale_muon", 0.03)],
)
def test_the_recipe_is_the_contender(block, contender, rate):
    names: dict[str, Any] = {}
    exec(BLOCKS[block], names)
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": rng.normal(size=(8, 8)), "bias": rng.normal(size=8)} for name in "ab"
    }
    if contender == "unit_scale_muon":
        params["c"] = {"embedding": rng.normal(size=(5, 8))}
    params = jax.tree.map(jnp.float32, params)
    updates = []
    for tx in (names["tx"], CONTENDERS[contender].make(rate)):
        state = tx.init(params)
        # Optax's Muon mixes an integer count with floats.
        with jax.numpy_dtype_promotion("standard"):
            _, state = tx.update(params, state, params)
            updates.append(tx.update(params, state, params)[0])
    chex.assert_trees_all_close(*updates, rtol=1e-5)


def test_the_table_of_magnitudes_is_that_of_the_file():
    file = ROOT / "benchmarks/results/cpu-2-cores/range.json"
    rows = [["dtype", *(f"`{name}`" for name in METHODS)], ["---"] * (1 + len(METHODS))]
    for dtype, columns in json.loads(file.read_text())["norms"].items():
        norms = {name: [float(norm) for norm in columns[name]] for name in METHODS}
        rows.append([dtype, *(extent(columns["elements"], norms[name]) for name in METHODS)])
    assert "\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n" in README


def test_the_table_of_times_is_that_of_the_file():
    file = ROOT / "benchmarks/results/cpu-2-cores/speed.json"
    rows = json.loads(file.read_text())["results"]["transformation"]
    lines = []
    for model, dtype in itertools.product(("1M", "35M", "124M", "350M"), ("float32", "bfloat16")):
        seconds = {
            row["name"]: row["seconds"]["median"]
            for row in rows
            if (row["model"], row["dtype"]) == (model, dtype)
        }
        pairs = [
            ("unit_scale()", "x * rsqrt(sum(x * x))"),
            ("unit_scale()", "torch: p.grad /= norm(p.grad)"),
            ("unit_scale()", "torch: foreach norm, div"),
            ('unit_scale(scope="global")', "x * rsqrt(sum of all x * x)"),
            ('unit_scale(scope="global")', "optax.normalize_by_update_norm()"),
        ]
        ratios = [f"{seconds[ours] / seconds[theirs]:.2f}" for ours, theirs in pairs]
        lines.append(f"| {' | '.join([f'{model[:-1]} M', dtype, *ratios])} |\n")
    assert "".join(lines) in README


def test_the_share_of_a_training_step_is_that_of_the_file():
    file = ROOT / "benchmarks/results/cpu-2-cores/speed.json"
    rows = json.loads(file.read_text())["results"]["training"]
    ratios = {row["name"]: 100 * row["ratio"]["median"] for row in rows}
    ours = ["unit_scale()", 'unit_scale(scope="global")']
    alone = [f"{ratios[f'{name} alone']:.1f} %" for name in ours]
    within = [f"{ratios[f'{name}, sgd'] / 100:.2f}" for name in ours]
    sentence = (
        f"At {rows[0]['model'][:-1]} M parameters and {rows[0]['tokens']} tokens a training step, "
        f"it takes, run alone, as long as {alone[0]} of the step per tensor and {alone[1]} as a "
        f"whole; a step that has it takes {within[0]} and {within[1]} times as long as one of "
        "plain SGD, and steps differ by more from round to round."
    )
    assert sentence in " ".join(README.split())
    assert all(
        row["ratio"]["low"] <= 1 <= row["ratio"]["high"] for row in rows if ", sgd" in row["name"]
    )


def test_what_clipping_by_block_is_faster_by_is_that_of_the_file():
    file = ROOT / "benchmarks/results/cpu-2-cores/speed.json"
    rows = json.loads(file.read_text())["results"]["transformation"]
    seconds = {(x["name"], x["model"], x["dtype"]): x["seconds"]["median"] for x in rows}
    said = []
    for model in ("1M", "35M", "124M", "350M"):
        pair = ("unit_scale()", "optax.clip_by_block_rms(1)")
        ours, theirs = (seconds[name, model, "float32"] for name in pair)
        said.append(f"{100 * (ours / theirs - 1):.0f} % at {model[:-1]} M")
    first, second, third, last = said
    sentence = f"by {first} parameters, {second}, {third} and {last}; to clipping"
    assert sentence in " ".join(README.split())


def test_what_compiling_takes_is_that_of_the_file():
    file = ROOT / "benchmarks/results/cpu-2-cores/speed.json"
    rows = json.loads(file.read_text())["results"]["leaves"]
    seconds = {
        (x["name"], x["leaves"]): x["trace_seconds"] + x["compile_seconds"]
        for x in rows
        if "stopped" not in x
    }
    pairs = (("unit_scale()", "optax.clip_by_block_rms(1)"),)
    pairs += (('unit_scale(scope="global")', "optax.normalize_by_update_norm()"),)
    leaf, whole = (
        {n: seconds[ours, n] / seconds[theirs, n] for name, n in seconds if name == ours}
        for ours, theirs in pairs
    )
    text = " ".join(README.split())
    assert f"compile tens of tensors, up to [{max(leaf.values()):.0f} times]" in text
    assert max(leaf, key=lambda n: leaf[n]) in (10, 30, 100)
    assert max(seconds["unit_scale()", n] for n in (10, 30, 100)) < 1
    assert (
        f"With 2000 small tensors it compiles faster: per tensor in {100 * leaf[2000]:.0f} % of "
        f"the time of `clip_by_block_rms`, as a whole in {100 * whole[2000]:.0f} % of that of "
        "`normalize_by_update_norm`."
    ) in text


def test_the_diagram_is_that_of_the_imports():
    imports = set()
    modules = {path.stem: path for path in (ROOT / "optax_unitscale").glob("*.py")}
    del modules["__init__"]
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "optax_unitscale":
                imports |= {(name, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and "optax_unitscale." in (node.module or ""):
                imports.add((name, str(node.module).partition(".")[2]))
    # An import that a longer chain of imports implies has no arrow.
    arrows = {pair for pair in imports if not reaches(pair[0], pair[1], imports - {pair})}
    drawn = re.findall(r"^  (\w+)(?:\[[^]]+\])? --> (\w+)", README, re.MULTILINE)
    assert set(drawn) == arrows
    assert {name for arrow in arrows for name in arrow} == set(modules)
    assert not any(reaches(name, name, imports) for name in modules)


def reaches(start, end, pairs):
    """Whether one gets from start to end, a pair after the other."""
    return any(b == end or reaches(b, end, pairs - {(a, b)}) for a, b in pairs if a == start)


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[[^]]+\]\((\S+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_the_table_of_tasks_is_that_of_the_file():
    file = ROOT / "benchmarks/results/cpu-2-cores/compare/compare.json"
    results = json.loads(file.read_text())
    assert verdicts.table(results) + "\n" in README
    assert not any(x["at_edge"] for result in results.values() for x in result["standings"])
    places = {x["optimizer"]: x["test"] for x in results["language_modelling"]["standings"]}
    low, high = min(places["unit_scale"]), max(places["unit_scale"])
    assert f"three further seeds end at {low:.2f} to {high:.2f} bits" in " ".join(README.split())
    low, high = min(places["adamw"]), max(places["adamw"])
    assert f"of AdamW at {low:.2f} to {high:.2f} (" in " ".join(README.split())
    # What the words below it say.
    means = {
        task: {place["optimizer"]: place["mean"] for place in result["standings"]}
        for task, result in results.items()
    }
    for task in ("vanishing", "vanishing_16", "vanishing_32"):
        for name in ("sgd", "clip", "lion", "unit_scale_global"):
            assert means[task][name] < 12
    assert f"{means['vanishing']['unit_scale']:.0f}" == "89"
    assert f"{means['vanishing_16']['unit_scale']:.0f}" == "52"
    assert means["vanishing"]["lamb"] > 95
    assert means["vanishing_16"]["muon"] > 95
    for task, least in (("vanishing_4", 97), ("vanishing", 97), ("vanishing_16", 95)):
        assert means[task]["unit_scale_spectral"] > least
    deepest = dict(means["vanishing_32"])
    assert deepest.pop("unit_scale_spectral") > 93
    assert max(deepest.values()) < 25
    exploding = {x["optimizer"]: x["test"] for x in results["exploding"]["standings"]}
    others = [max(x) for name, x in exploding.items() if not name.startswith("unit_scale")]
    assert min(exploding["unit_scale"]) > max(others)
    # With the sign by which less is better.
    signs = {task: -1 if x["higher_is_better"] else 1 for task, x in results.items()}
    loss = {task: {name: signs[task] * x for name, x in means[task].items()} for task in means}
    outcomes = {
        task: getattr(verdicts.judge(result), "outcome", None) for task, result in results.items()
    }
    for task in ("language_modelling", "translation", "dialogue"):
        ours = loss[task]
        verdict = verdicts.judge(results[task])
        assert verdict
        assert (verdict.ours["optimizer"], verdict.other["optimizer"]) == (
            "unit_scale_muon",
            "muon",
        )
        without = [x for name, x in ours.items() if name[:4] == "unit" and name not in ORTHOGONAL]
        assert ours["adamw"] < min(without) == ours["unit_scale_adam"]
        assert ours["unit_scale_adam"] < min(ours["sgd"], ours["clip"])
        assert ours["clip"] < ours["unit_scale"]
    assert outcomes["dialogue"] == "better"
    for task in ("summarization", "question_answering"):
        assert loss[task]["muon"] < loss[task]["unit_scale_spectral"]
    level = ("language_modelling", "translation", "image_classification", "summarization")
    for task in (*level, "question_answering", "object_detection"):
        assert outcomes[task] == "level"
    assert 61.8 < max(means["question_answering"].values()) < 65
    shallow = {x["optimizer"]: x["test"] for x in results["vanishing"]["standings"]}
    assert sorted(accuracy > 50 for accuracy in shallow["adamw"]) == [False, False, True]
    for task, result in results.items():
        pair = ("unit_scale", "unit_scale_last")
        places = {x["optimizer"]: x["test"] for x in result["standings"]}
        after, before = ([signs[task] * value for value in places[name]] for name in pair)
        assert min(after) <= max(before)
    for task in ("vanishing", "vanishing_16", "exploding", "language_modelling"):
        assert loss[task]["unit_scale"] < loss[task]["unit_scale_last"]
    detection = {x["optimizer"]: x["test"] for x in results["object_detection"]["standings"]}
    assert min(detection["unit_scale_global"]) > 20.5
    assert min(detection["clip"]) == pytest.approx(11.8, abs=0.05)
    assert max(detection["clip"]) == pytest.approx(22.3, abs=0.05)
    detected = means["object_detection"]
    assert detected["unit_scale_global"] == max(detected.values())
    for other, wins in (("sgd", 5), ("clip", 4)):
        gaps = [
            {x["optimizer"]: x["gap"] for x in result["standings"]} for result in results.values()
        ]
        learnt = {*results} - {"vanishing", "vanishing_16", "vanishing_32", "exploding"}
        gaps = [gap for task, gap in zip(results, gaps, strict=True) if task in learnt]
        assert len(gaps) == 8
        assert sum(gap["unit_scale"] < gap[other] for gap in gaps) == wins


def test_the_table_of_sizes_is_that_of_the_file():
    file = ROOT / "benchmarks/results/cpu-2-cores/transfer/transfer.json"
    results = json.loads(file.read_text())
    assert moves.table(results) + "\n" in README
    best = {
        family: {
            name: {int(size): x for size, x in own.items()} for name, own in results[family].items()
        }
        for family in results
    }
    for family, own in best.items():
        assert set(own["adam"]) == set(FAMILIES[family].sizes)
    # What the words say.
    spread = max(
        x["range"]
        for name in best
        if name != "mlp_width"
        for own in best[name].values()
        for x in own.values()
    )
    assert f"seeds differ by up to {spread:.2f} on the GPT" in " ".join(README.split())
    moved = {
        family: {
            name: max(x["learning_rate"] for x in own.values())
            / min(x["learning_rate"] for x in own.values())
            for name, own in found.items()
        }
        for family, found in best.items()
    }
    widths, depths = moved["gpt_width"], moved["gpt_depth"]
    words = " ".join(README.split())
    adam = f"{widths['adam']:.1f} over widths and {depths['adam']:.1f} over depths."
    assert f"where Adam's moves by {adam}" in words
    assert f"Muon's own rate moves by {widths['muon']:.1f} and {depths['muon']:.1f}," in words
    shaped = best["gpt_width"]["unit_scale_shape"]
    from_64 = [x["learning_rate"] for size, x in shaped.items() if size >= 64]
    said = f"on a rate that moves by {max(from_64) / min(from_64):.1f}, from 32 on by"
    assert f"{said} {widths['unit_scale_shape']:.1f}, and over depths by none" in words
    assert depths["unit_scale_shape"] == 1
    steps = moved["gpt_steps"]
    longest = {name: own[1600]["loss"] for name, own in best["gpt_steps"].items()}
    said = f"with Muon fall by {steps['muon']:.1f}, Adam's by {steps['adam']:.1f};"
    assert steps["muon"] == steps["unit_scale_muon"]
    assert said in " ".join(README.split())
    assert f"({longest['muon']:.3f}, `unit_scale_muon` {longest['unit_scale_muon']:.3f})" in README
    assert min(longest, key=longest.__getitem__) == "muon"
    assert longest["adam"] < longest["unit_scale_shape_rows"]
    batches = moved["gpt_batch"]
    assert f"({batches['muon']:.1f} against {batches['unit_scale_muon']:.1f})" in words
    assert f"{depths['unit_scale_last']:.1f}" == "2.0"
    for found in (widths, depths):
        assert f"{found['unit_scale_muon']:.1f}" == "1.4"
        assert found["adamw_width"] < 1.45
    assert widths["adamw_width"] == 1
    assert widths["unit_scale_last"] < 1.45
    rows = (found["unit_scale_shape_rows"] for found in (widths, depths))
    assert "moves by {:.1f} over widths and {:.1f} over depths.".format(*rows) in " ".join(
        README.split()
    )
    for family in ("gpt_width", "gpt_depth", "gpt_batch"):
        for size in best[family]["adam"]:
            loss = {name: own[size]["loss"] for name, own in best[family].items()}
            assert min(loss, key=loss.__getitem__) == "unit_scale_muon"
            assert loss["unit_scale_shape_rows"] < loss["adam"] < loss["unit_scale_shape"]
    for size, x in best["gpt_width"]["unit_scale_shape"].items():
        assert x["loss"] > best["gpt_width"]["unit_scale_last"][size]["loss"]
    deepest = {name: own[16]["loss"] for name, own in best["gpt_depth"].items()}
    gap = abs(deepest["unit_scale_shape"] - deepest["unit_scale_last"])
    assert gap < best["gpt_depth"]["unit_scale_last"][16]["range"]
    to_1024 = [best["mlp_width"]["adam"][size]["learning_rate"] for size in (64, 256, 1024)]
    for rate in (
        to_1024[0] / to_1024[-1],
        *(moved["mlp_width"][x] for x in ("muon", "unit_scale_muon")),
    ):
        assert f"{rate:.1f}" == "2.8"
    pair = [best["mlp_width"][name][1024] for name in ("muon", "unit_scale_muon")]
    assert abs(pair[0]["loss"] - pair[1]["loss"]) < min(x["range"] for x in pair)
    digits = {name: own[1024]["loss"] for name, own in best["mlp_width"].items()}
    assert digits.pop("unit_scale_shape") > 3 * max(digits.values())


def test_what_was_tried_on_the_way_is_that_of_the_files():
    folder = ROOT / "benchmarks/results/cpu-2-cores"
    tried, main = (
        json.loads((folder / name / "transfer.json").read_text())["gpt_width"]
        for name in ("transfer_tried", "transfer")
    )
    assert tried.keys() == set(CONTENDERS) - set(COMPARED) - set(TRANSFERRED)
    loss = {name: own["256"]["loss"] for name, own in (main | tried).items()}
    section = " ".join(README.split("- What led there")[1].split("\n\n")[0].split())
    said = re.findall(r"`(\w+)`\)?,? (2\.\d+)", section)
    said += [
        (name, x) for x, name in re.findall(r"(2\.\d+) [^;]*?\(`(unit_scale_muon\w*)`\)", section)
    ]
    assert dict(said) == {name: f"{loss[name]:.2f}" for name, _ in said}
    assert dict(said).keys() == tried.keys() | {
        "unit_scale_shape",
        "unit_scale_shape_rows",
        "unit_scale_muon",
    }
