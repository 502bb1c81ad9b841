"""The tasks' data and the models: deterministic, disjoint, causal."""

import dataclasses
import importlib
import math
import pathlib
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from task_checks import TEXT, VISION, check_batches, check_results

from benchmarks import tasks
from benchmarks.models.gpt import GPT, GPTConfig
from benchmarks.tasks import language_modelling

pytestmark = pytest.mark.slow


def test_batches_and_data_are_those_of_the_results():
    check_batches("language_modelling")
    check_results("language_modelling")
    # The others are checked where their data are read.
    assert set(tasks.TASKS) == {*TEXT, *VISION, "language_modelling", "finetune"}


def test_where_an_accelerator_is_at_hand_the_language_model_is_larger_and_trains_for_longer():
    task = language_modelling.load()
    large = tasks.enlarged(task)
    assert (large.steps, large.batch_size) == (10 * task.steps, 4 * task.batch_size)
    shapes = nnx.eval_shape(lambda: nnx.state(large.model(0), nnx.Param))
    assert 25e6 < sum(x.size for x in jax.tree.leaves(shapes)) < 26e6
    assert large.batch(0, 1, 2).shape == (2, language_modelling.LARGE.context + 1)


def test_weights_are_a_function_of_the_seed():
    model = language_modelling.load().model
    first, again, other = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.state(model(seed), nnx.Param))])
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_splits_hold_each_paragraph_of_the_text_once_and_share_none():
    parts = {name: part.tobytes() for name, part in language_modelling.splits().items()}
    assert list(parts) == ["train", "validation", "test"]
    paragraphs = b"".join(parts.values()).decode().split("\n\n")
    topics = "\n\n".join(topic.strip() for topic in pydoc_data.topics.topics.values())
    assert sorted(paragraphs) == sorted(set(topics.split("\n\n")))
    assert min(map(len, parts.values())) > 10_000
    lines = {name: {x for x in part.splitlines() if len(x) > 60} for name, part in parts.items()}
    assert not lines["test"] & (lines["train"] | lines["validation"])


def test_a_later_token_does_not_change_earlier_logits():
    model = GPT(GPTConfig(vocabulary=11, context=8, depth=2, heads=2, width=16), nnx.Rngs(0))
    tokens = jnp.arange(8)[None]
    before, after = model(tokens), model(tokens.at[0, 5].set(9))
    np.testing.assert_array_equal(np.asarray(before)[0, :5], np.asarray(after)[0, :5])
    assert not np.allclose(np.asarray(before)[0, 5:], np.asarray(after)[0, 5:])


def test_a_module_in_the_folder_is_a_task():
    folder = pathlib.Path(language_modelling.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(tasks.TASKS) == files
    modules = [importlib.import_module(f"benchmarks.tasks.{name}") for name in files]
    assert all(callable(module.load) for module in modules)


@pytest.mark.parametrize(("higher", "lower"), [(2.0, 1.0), (math.inf, 1.0)])
def test_better_follows_the_direction_of_the_metric(higher, lower):
    task = language_modelling.load()
    upwards = dataclasses.replace(task, higher_is_better=True)
    assert (upwards.better(higher, lower), task.better(higher, lower)) == (True, False)
    assert (upwards.better(lower, higher), task.better(lower, higher)) == (False, True)
    assert upwards.better(lower, lower)
    assert task.better(lower, lower)
    assert not upwards.better(math.nan, lower)
    assert not task.better(math.nan, lower)


def test_a_sample_holds_nothing_that_a_terminal_would_obey():
    task = language_modelling.load()
    text = task.sample(task.model(0), 0)
    assert "▸" in text
    assert all(c.isprintable() or c == "\n" for c in text)
