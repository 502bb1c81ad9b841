"""The tasks that read and write text: splits without leaks, losses, metrics, and short runs."""

import collections
import itertools
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from task_checks import TEXT, check_batches, check_results

from benchmarks import data
from benchmarks.__main__ import main
from benchmarks.models.gpt import GPT, GPTConfig, complete
from benchmarks.models.reader import Reader
from benchmarks.tasks import Task, summarization, translation
from benchmarks.tasks import load as load_task
from benchmarks.tasks.shared import boolq
from benchmarks.tasks.shared.completion import END, PAD, SEPARATOR, Examples, Pairs, loss

pytestmark = pytest.mark.slow

SPLITS = ["train", "validation", "test"]


@pytest.mark.parametrize("name", TEXT)
def test_a_batch_is_a_function_of_seed_and_step(name):
    check_batches(name)


@pytest.mark.parametrize("name", TEXT)
def test_the_data_are_those_that_compare_was_run_on_and_its_best_rates_are_those_of_train(name):
    check_results(name)


def disjoint(units: dict[str, set[str]]) -> bool:
    return not any(units[a] & units[b] for a, b in itertools.combinations(SPLITS, 2))


def test_no_unit_is_in_two_splits_and_the_order_of_the_items_does_not_matter():
    items = [(unit, item) for unit in range(400) for item in range(5)]
    divided = data.divide(items, lambda item: str(item[0]))
    assert sorted(itertools.chain(*divided.values())) == items
    assert disjoint({name: {str(item[0]) for item in part} for name, part in divided.items()})
    assert divided == data.divide(reversed(items), lambda item: str(item[0]))
    assert [len(divided[name]) // 5 for name in SPLITS] == pytest.approx([360, 20, 20], abs=15)


def test_no_message_to_translate_is_in_two_splits_and_placeholders_are_kept():
    parts = translation.splits()
    words = {
        name: {"".join(filter(str.isalnum, source.lower())) for source, _ in part}
        for name, part in parts.items()
    }
    assert disjoint(words)
    assert min(map(len, words.values())) > 100
    assert ("Editing %(name)s", "Édition de la page %(name)s") in parts["validation"]
    assert not any("\x04" in source for part in parts.values() for source, _ in part)


def test_no_article_is_in_two_splits_of_the_questions():
    parts = boolq.splits()
    assert disjoint({name: {x.passage for x in part} for name, part in parts.items()})
    titles = {name: {x.passage.split(" -- ")[0] for x in part} for name, part in parts.items()}
    assert disjoint(titles)
    count = collections.Counter(x.yes for part in parts.values() for x in part)
    assert count[True] > count[False] > 4000


def test_no_docstring_is_in_two_splits():
    parts = summarization.splits()
    assert disjoint({name: {prompt for prompt, _ in part} for name, part in parts.items()})
    assert disjoint({name: {summary for _, summary in part} for name, part in parts.items()})
    assert min(map(len, parts.values())) > 100


def small_gpt() -> GPT:
    return GPT(GPTConfig(vocabulary=50, context=12, depth=2, heads=4, width=32), nnx.Rngs(0))


def test_a_completion_keeps_what_is_given_and_takes_the_likeliest_token_each_time():
    model = small_gpt()
    predict = nnx.jit(lambda model, tokens: model(tokens))
    tokens = np.random.default_rng(0).integers(50, size=(4, 12)).astype(np.int32)
    given = np.array([1, 3, 8, 12], np.int32)
    expected = tokens.copy()
    for row, start in enumerate(given):
        for position in range(start, 12):
            # Later tokens do not matter.
            logits = predict(model, jnp.asarray(expected[row : row + 1]))
            expected[row, position] = int(logits[0, position - 1].argmax())
    found = complete(model, jnp.asarray(tokens), jnp.asarray(given))
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_the_loss_counts_the_completion_and_its_end_alone():
    tokens = np.array([[7, 8, SEPARATOR, 9, END, PAD, PAD], [7, SEPARATOR, 5, 6, 9, 8, END]])
    tokens, given = tokens.astype(np.int32), np.array([3, 2], np.int32)
    model = small_gpt()
    logits = model(jnp.asarray(tokens[:, :-1]))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens[:, 1:]))
    # The first row's 9 and its end; the second's 5, 6, 9, 8 and its end.
    expected = np.concatenate([np.asarray(each)[0, 2:4], np.asarray(each)[1, 1:6]]).mean()
    examples = Examples(jnp.asarray(tokens), jnp.asarray(given))
    assert float(loss(model, examples)) == pytest.approx(expected, rel=1e-5)


def test_long_prompts_and_completions_lose_their_ends_but_keep_the_separators():
    pair = ("one two three " * 9, "four five six " * 9)
    splits = {name: [pair] for name in SPLITS}
    pairs = Pairs(splits, vocabulary=300, prompt=4, completion=3, evaluated=1)
    ((row,), (given,)) = pairs.examples["test"]
    assert len(row) == pairs.context == 9
    assert (given, row[4], row[8]) == (5, SEPARATOR, END)


def test_the_scores_are_those_worked_out_by_hand():
    # One letter of three and one pair of two are missing: the mean recall is 7/12, the precision 1,
    # and chrF weights the recall by 4.
    assert translation.score(["ab"], ["abc"]) == pytest.approx(100 * 5 * (7 / 12) / (4 + 7 / 12))
    # Two of two words are in order, of three wanted.
    assert summarization.score(["the sum"], ["the sum wanted"]) == pytest.approx(80)


def indifferent(task: Task) -> nnx.Module:
    """A model that gives every answer the same logit."""
    model = task.model(0)
    assert isinstance(model, GPT | Reader)
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    return model


def test_the_perplexity_of_an_indifferent_model_is_the_size_of_the_vocabulary():
    task = load_task("dialogue")
    perplexity = task.evaluate(indifferent(task), "validation")
    assert perplexity == pytest.approx(2000, rel=1e-4)


def test_a_model_that_answers_every_question_alike_has_the_share_of_that_answer():
    task = load_task("question_answering")
    right = task.evaluate(indifferent(task), "test")
    majority = boolq.majority(boolq.splits()["test"])
    assert right == pytest.approx(100 - majority)
    assert f"{majority:.1f}" == "61.8", "the README says so"
    assert task.sample(indifferent(task), 0).endswith(f"of always the same answer {majority:.1f} %")


@pytest.mark.parametrize("name", TEXT)
def test_a_short_run_ends_with_a_result_and_a_sample(name, tmp_path, capsys):
    options = ["--task", name, "--steps", "2", "--batch-size", "4", "--optimizer", "unit_scale"]
    assert main(["train", *options, "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entries = {entry["kind"]: entry for entry in map(json.loads, lines)}
    assert entries["sample"]["text"].count("\n▸ ") >= 4
    assert all(entries["result"][split] >= 0 for split in SPLITS)
    assert load_task(name).metric in capsys.readouterr().out


def test_data_that_cannot_be_fetched_is_answered_by_one_line_and_status_2(
    tmp_path, monkeypatch, capsys
):
    translation.load.cache_clear()
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path))
    # Nothing listens on port 9.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--task", "translation"])
    error = capsys.readouterr().err
    assert "cannot fetch jupyterlab-language-pack-fr-FR 4.5.post3: " in error
    assert error.count("\n") == 1
