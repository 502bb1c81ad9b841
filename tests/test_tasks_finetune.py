"""The pretrained checkpoint: its numbers as published, as PyTorch's, and as it goes on learning."""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracle import epsilon
from task_checks import check_batches

from benchmarks import optimizers, tasks
from benchmarks.__main__ import main
from benchmarks.models.bert import Bert, Classifier, Config, mean, restore
from benchmarks.tasks import finetune
from benchmarks.tasks.shared import boolq, minilm
from optax_unitscale import layers_of

pytestmark = pytest.mark.slow


# Recorded by records/record_minilm.py.
RECORD = np.load(pathlib.Path(__file__).parent / "records" / "minilm.npz")
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "layer_norm_eps": 1e-12,
}
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def checkpoint() -> minilm.Checkpoint:
    return minilm.read()


@pytest.fixture(scope="module")
def model() -> Bert:
    return minilm.make()


def test_a_batch_is_a_function_of_seed_and_step_and_no_sweep_found_its_rates():
    check_batches("finetune")
    assert not tasks.tuned("finetune")


def forward(tensors: Tensors, config: Config, tokens: np.ndarray, kinds: np.ndarray):
    """A BERT's vectors for each of some texts, one text at a time and without padding."""
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    erf = np.vectorize(math.erf)

    def linear(x, name):
        return x @ wide[f"{name}.weight"].T + wide[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return centred / deviation * wide[f"{name}.weight"] + wide[f"{name}.bias"]

    def softmax(x):
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def encode(ids, types):
        embeddings = "word_embeddings", "position_embeddings", "token_type_embeddings"
        words, places, sorts = (wide[f"embeddings.{name}.weight"] for name in embeddings)
        x = norm(words[ids] + places[: len(ids)] + sorts[types], "embeddings.LayerNorm")
        size = config["hidden_size"] // config["num_attention_heads"]
        for i in range(config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}"
            query, key, value = (
                linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value")
            )
            heads = []
            for h in range(config["num_attention_heads"]):
                part = slice(h * size, (h + 1) * size)
                scores = query[:, part] @ key[:, part].T / np.sqrt(size)
                heads.append(softmax(scores) @ value[:, part])
            found = linear(np.concatenate(heads, -1), f"{layer}.attention.output.dense")
            x = norm(x + found, f"{layer}.attention.output.LayerNorm")
            up = linear(x, f"{layer}.intermediate.dense")
            down = linear(up * (1 + erf(up / np.sqrt(2))) / 2, f"{layer}.output.dense")
            x = norm(x + down, f"{layer}.output.LayerNorm")
        return x

    rows = zip(tokens, kinds, strict=True)
    return [encode(row[row != 0], types[row != 0]) for row, types in rows]


def run(model: Bert, tokens: np.ndarray, kinds: np.ndarray) -> jax.Array:
    call = nnx.jit(lambda model, *inputs: model(*inputs))
    return call(model, jnp.asarray(tokens), jnp.asarray(kinds))


def random_tensors(config: Config) -> Tensors:
    """A checkpoint of random numbers, with the tensors that go unused."""
    rng = np.random.default_rng(0)
    width = config["hidden_size"]
    square, across = (width, width), (config["intermediate_size"], width)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "pooler.dense.weight": square,
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{layer}.attention.{name}.weight"] = square
        shapes[f"{layer}.intermediate.dense.weight"] = across
        shapes[f"{layer}.output.dense.weight"] = across[::-1]
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    shapes |= {f"{name}.weight": (width,) for name in norms}
    inner = {name for name in shapes if not name.endswith("embeddings.weight")}
    shapes |= {f"{name.removesuffix('weight')}bias": shapes[name][:1] for name in inner}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["texts", "pairs"])
def test_the_tokens_are_those_of_transformers(name):
    texts = [text if name == "texts" else tuple(text) for text in RECORD[name].tolist()]
    tokens, kinds = minilm.encode(texts, RECORD[f"{name}_tokens"].shape[1])
    np.testing.assert_array_equal(tokens, RECORD[f"{name}_tokens"])
    np.testing.assert_array_equal(kinds, RECORD[f"{name}_kinds"])
    assert (tokens == 0).any()


@pytest.mark.parametrize("name", ["texts", "pairs"])
def test_the_vectors_are_those_of_pytorch_and_of_numpy(name, checkpoint, model):
    tokens, kinds = RECORD[f"{name}_tokens"], RECORD[f"{name}_kinds"]
    vectors = forward(checkpoint.tensors, checkpoint.config, tokens, kinds)
    expected = np.stack([rows.mean(0) for rows in vectors])
    # Both in float64; each of the six blocks adds up at most 1536 products.
    recorded = RECORD[f"{name}_means"]
    atol = 1536 * epsilon(np.float64) * np.abs(recorded).max()
    np.testing.assert_allclose(expected, recorded, rtol=0, atol=atol)
    found = mean(run(model, tokens, kinds), jnp.asarray(tokens))
    # Rounding errors of sums of 1536 terms grow like the root of that, 39, and add up likewise
    # over four sums in each of six blocks.
    atol = math.sqrt(1536 * 24) * epsilon(np.float32) * np.abs(recorded).max()
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=atol)


def test_a_small_bert_computes_what_numpy_computes_and_ignores_padding():
    tensors = random_tensors(SMALL)
    model = Bert(SMALL, nnx.Rngs(0))
    restore(model, tensors)
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, SMALL["vocab_size"], (3, 10)).astype(np.int32)
    tokens[1, 6:] = 0
    kinds = rng.integers(2, size=(3, 10)).astype(np.int32)
    found = np.asarray(run(model, tokens, kinds))
    for row, expected in zip(found, forward(tensors, SMALL, tokens, kinds), strict=True):
        # Random weights make large scores, which the softmax turns into relative errors.
        atol = 1000 * epsilon(np.float32) * np.abs(expected).max()
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=atol)


def test_an_example_is_a_question_and_then_its_passage(checkpoint):
    vocabulary = json.loads(checkpoint.tokenizer)["model"]["vocab"]
    words = {index: word for word, index in vocabulary.items()}
    part = boolq.splits()["validation"]
    tokens, kinds = finetune.encode(part)
    assert tokens.shape == kinds.shape == (len(part), finetune.LENGTH)
    ends = tokens == vocabulary["[SEP]"]
    assert (tokens[:, 0] == vocabulary["[CLS]"]).all()
    assert (ends.sum(1) == 2).all()
    # The first end still belongs to the question.
    second = np.cumsum(ends, 1) - ends == 1
    np.testing.assert_array_equal(kinds, second)
    start = " ".join(words[index] for index in tokens[0, 1 : np.argmax(ends[0])])
    assert start.replace(" ##", "") == part[0].question


def test_a_few_steps_of_unit_scale_lower_the_loss_and_change_the_last_blocks_alone():
    task = finetune.load()
    model = task.model(0)
    assert isinstance(model, Classifier)
    batch = task.batch(0, 1, 4)
    steps = 6
    transformation = optimizers.make("unit_scale", 0.003, steps, layers_of(model))
    graph, parameters, others = nnx.split(model, nnx.Param, ...)
    before = jax.device_get(parameters)

    @jax.jit
    def step(parameters, state, others):
        model = nnx.merge(graph, parameters, others)
        loss, gradients = nnx.value_and_grad(task.loss)(model, batch)
        updates, state = transformation.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    state, losses = transformation.init(parameters), []
    for _ in range(steps):
        parameters, state, loss = step(parameters, state, others)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(parameters), strict=True):
        assert not np.array_equal(x, np.asarray(y))
    names = {"/".join(map(str, path[:3])) for path, _ in nnx.to_flat_state(before)}
    blocks = {name.rpartition("/")[0] for name in names if name.startswith("bert/")}
    assert blocks == {"bert/blocks"}


def test_a_short_run_ends_with_a_result_and_a_sample(tmp_path, capsys, monkeypatch):
    finetune.load.cache_clear()
    monkeypatch.setattr(finetune, "EVALUATED", 16)
    options = ["--task", "finetune", "--steps", "2", "--batch-size", "4"]
    options += ["--optimizer", "unit_scale", "--out", str(tmp_path)]
    assert main(["train", *options]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entries = {entry["kind"]: entry for entry in map(json.loads, lines)}
    assert entries["sample"]["text"].count("\n▸ ") == 4
    assert all(0 <= entries["result"][split] <= 100 for split in ("train", "validation", "test"))
    assert "bert/blocks/5/query/kernel" in entries["step"]["norms"]
    assert "accuracy [%]" in capsys.readouterr().out
