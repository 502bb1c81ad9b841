"""`python -m benchmarks compare`: equal budgets, sweeps that go on, and what they say."""

import dataclasses
import functools
import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from common import compilations

from benchmarks import __main__, tasks
from benchmarks.arguments import UsageError
from benchmarks.commands.compare import PRESETS, about, work
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.runs import Log
from benchmarks.sweep import jobs, session
from benchmarks.sweep.search import Plan, half_decade, next_index, tune
from benchmarks.sweep.standings import judge, plot_tasks, standings, verdicts
from benchmarks.sweep.trial import PARTS, Trial, Trials

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
TASK = "vanishing_4"
PATIENCE = 240
PLAN = PRESETS["try"]
# One process, which has all cores, as this one has.
SWEEP = [
    "compare",
    "--task",
    TASK,
    "--preset",
    "try",
    "--optimizer",
    "unit_scale",
    "--workers",
    "1",
]


@pytest.fixture(scope="module")
def task():
    return dataclasses.replace(tasks.load(TASK), target=50.0)


def trial(optimizer="sgd", rate=0.1, seed=0, value=60.0, **changes):
    """A trial whose metric is `value` on the validation split, one more in training, one less."""
    results = {"train": value + 1, "validation": value, "test": value - 1}
    losses = [2.0] * (PARTS + 1)
    fields = {"losses": losses, "results": results, "seconds": 0.5}
    return Trial(optimizer, rate, seed, **(fields | changes))


def lost(**changes):
    results = dict.fromkeys(("train", "validation", "test"))
    return trial(losses=[2.0, None], results=results, **changes)


@pytest.mark.parametrize("peak", [-3, 0, 2, 7])
def test_every_search_has_as_many_tries_and_ends_around_the_best_of_them(peak):
    tried: dict[int, float] = {}
    while len(tried) < 7:
        index = next_index(tried, start=0)
        assert index not in tried
        tried[index] = -float(abs(index - peak))
    assert max(tried) - min(tried) == 6
    if abs(peak) < 4:
        assert min(tried) < peak < max(tried)
    else:
        assert max(tried) == 5


def test_a_search_walks_away_from_where_runs_diverge():
    tried = {0: -math.inf, -1: -math.inf, 1: -math.inf, 2: -math.inf}
    assert next_index({0: -math.inf, -1: 3.0, 1: -math.inf}, start=0) == -2
    assert next_index(tried, start=0) == -2


def test_half_decades_are_round():
    assert [half_decade(i) for i in (-3, -2, -1, 0, 1)] == [0.0316, 0.1, 0.316, 1.0, 3.16]


def test_tuning_takes_the_best_rate_by_validation_and_further_seeds_there(task):
    asked = []

    def run(rate, seed, decay=None):
        asked.append((rate, seed, decay))
        value = {1.0: 70.0}.get(rate, 50.0) + {None: 0.0, 0.1: 5.0}.get(decay, -5.0)
        return dataclasses.replace(trial(rate=rate, seed=seed, value=value), decay=decay)

    plan = Plan(rates=5, seeds=2, length=1.0)
    tune(run, task, Contender(0.1, optax.sgd), plan)
    assert len(set(asked)) == 7
    assert [seed for _, seed, _ in asked] == [0] * 5 + [1, 2]
    assert [rate for rate, *_ in asked[-2:]] == [1.0, 1.0]
    asked.clear()
    # Weight decays at the best rate, and the seeds at the best of these.
    tune(run, task, Contender(0.1, optax.adamw, (0.01, 0.1, 1.0)), plan)
    assert asked[5:8] == [(1.0, 0, decay) for decay in (0.01, 0.1, 1.0)]
    assert asked[8:] == [(1.0, 1, 0.1), (1.0, 2, 0.1)]
    asked.clear()
    tune(run, task, Contender(0.03, optax.sgd, tuned=False), plan)
    assert asked == [(0.03, seed, None) for seed in range(3)]


def test_standings_are_what_one_reads_off_the_trials(task):
    trials = [
        *(trial(rate=rate, value=value) for rate, value in ((0.01, 40), (0.1, 80), (1.0, 74))),
        *(trial(rate=0.1, seed=seed, value=60.0 + 10 * seed) for seed in (1, 2, 3)),
        # Of another rate: an earlier best of fewer rates.
        trial(rate=1.0, seed=1, value=10.0),
        # Weight decay that does not help.
        dataclasses.replace(trial(rate=0.1, value=75.0), decay=0.1),
        dataclasses.replace(trial(rate=0.1, seed=1, value=75.0), decay=0.1),
        *(trial("unit_scale", rate, value=value) for rate, value in ((0.1, 100), (1.0, 91))),
        lost(optimizer="unit_scale", rate=10.0),
        trial("unit_scale", 0.1, seed=1, value=100.0),
    ]
    first, second = standings(trials, task)
    assert (first.optimizer, second.optimizer) == ("unit_scale", "sgd")
    assert (first.near, second.near) == (1.0, 0.0)
    assert second.test == [69.0, 79.0, 89.0]
    assert second.mean == 79.0
    assert second.gap == 2.0


def test_where_lower_is_better_the_least_is_first(task):
    task = dataclasses.replace(task, higher_is_better=False)
    trials = [trial("sgd", seed=seed, value=3.0) for seed in (0, 1)]
    trials += [trial("clip", seed=seed, value=2.0) for seed in (0, 1)]
    trials += [trial("clip", 1.0, value=2.1), trial("clip", 10.0, value=2.3)]
    first, second = standings(trials, task)
    assert (first.optimizer, first.near, second.near) == ("clip", 1.0, 0.0)


def result(higher_is_better=True, **tests):
    """What `compare.json` holds of a task whose seeds ended at `tests`."""
    places = [
        {"optimizer": name, "test": test, "near": 0.5, "mean": test and sum(test) / len(test)}
        for name, test in tests.items()
    ]
    return {
        "metric": "points",
        "higher_is_better": higher_is_better,
        "target": 2.0,
        "standings": places,
    }


@pytest.mark.parametrize(
    ("ours", "other", "outcome"),
    [([3, 4], [1, 2], "better"), ([1, 2], [3, 4], "worse"), ([1, 3], [2, 4], "level")],
)
def test_the_verdict_is_level_where_seeds_overlap(ours, other, outcome):
    numbers = {"unit_muon": ours, "unit_scale_global": [9, 9], "lion": other, "sgd": [0, 1]}
    verdict = judge(result(**numbers))
    assert verdict is not None
    assert (verdict.ours["test"], verdict.other["test"], verdict.outcome) == (ours, other, outcome)
    lower = {name: [-value for value in values] for name, values in numbers.items()}
    verdict = judge(result(higher_is_better=False, **lower))
    assert verdict is not None
    assert verdict.outcome == outcome
    # Against one by name.
    verdict = judge(result(**numbers), "unit_scale_global", "sgd")
    assert verdict is not None
    assert (verdict.ours["test"], verdict.other["test"], verdict.outcome) == (
        [9, 9],
        [0, 1],
        "better",
    )


def test_there_is_no_verdict_without_seeds_on_both_sides():
    assert judge(result(unit_muon=[1.0], sgd=None)) is None
    assert judge(result(sgd=[1.0])) is None


def test_the_table_has_a_row_for_each_verdict_and_a_dash_for_what_was_left_out():
    task = result(unit_muon=[3.0, 4.0], adamw=[1.0, 2.0], sgd=[0.5, 1.0], clip=None)
    untuned = result(unit_muon_decay=[1.0], adamw=[1.0], unit_muon_untuned=None)
    _, _, *rows = verdicts({"a_a": task, "b": untuned, "another": result()}).splitlines()
    assert rows == [
        "| a a | points, higher is better | `adamw` 1.5 (1 to 2) | - | 3.5 (3 to 4), better | - |",
        "| b | points, higher is better | `adamw` 1 (1 to 1) | - | - | 1 (1 to 1), level |",
    ]


def test_the_picture_has_a_panel_for_each_task_and_a_mean_for_each_optimizer():
    figure = plot_tasks({"a_task": result(unit_scale=[3.0, 5.0], adamw=[1.0], lion=None)})
    first, *others = figure.axes
    assert first.get_title() == "a task"
    dots = [np.array(x.get_data()).T.tolist() for x in first.lines if x.get_marker() == "o"]
    assert [x.get_text() for x in first.get_yticklabels()] == ["unit_scale", "adamw", "lion"]
    assert dots == [[[4.0, 0.0]], [[1.0, 1.0]]]
    assert not others
    plt.close(figure)


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [([2.0, 1.0, 4.0], False), ([2.0, 1.0, 4.1], True), ([2.0, None], True), ([None, None], True)],
)
def test_a_run_diverged_whose_loss_is_no_number_or_doubled(losses, diverged):
    assert trial(losses=losses).diverged == diverged


@pytest.mark.parametrize("optimizer", CONTENDERS)
def test_no_contender_diverges_at_the_rate_that_its_search_starts_with(task, optimizer):
    # Optax's Adam mixes an integer count with floats.
    with jax.numpy_dtype_promotion("standard"):
        result = Trials(task, optimizer, 60, 64).run(CONTENDERS[optimizer].rate, 0)
    assert not result.diverged
    assert None not in result.results.values()


def test_trials_share_what_was_compiled_and_repeat_bit_for_bit(task):
    trials = Trials(task, "unit_scale", 40, 64)
    first = trials.run(0.1, 0)
    before = compilations()
    other = trials.run(0.03, 1)
    again = trials.run(0.1, 0)
    assert compilations() == before
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(first, seconds=0)
    assert other.losses != first.losses


def test_a_trial_that_leaves_the_numbers_ends_there(task):
    result = Trials(task, "sgd", 40, 64).run(1e38, 0)
    assert result.diverged
    assert result.results == {"train": None, "validation": None, "test": None}
    json.dumps(dataclasses.asdict(result), allow_nan=False)


def start(out, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *SWEEP, "--out", str(out), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read(out):
    path = out / f"{TASK}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def outcomes(out):
    """What the trials came to, without the time that they took."""
    return [entry | {"seconds": 0} for entry in read(out)[1:]]


def stop(process, out, lines, how):
    """Sends a signal once so many lines are written; what the process said."""
    deadline = time.monotonic() + PATIENCE
    while len(read(out)) < lines and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    return process.communicate(timeout=PATIENCE)[0]


def test_a_sweep_that_was_killed_and_then_stopped_goes_on_and_ends_like_one_that_was_not(
    task, tmp_path
):
    stop(start(tmp_path), tmp_path, 2, signal.SIGKILL)
    before = outcomes(tmp_path)
    assert 1 <= len(before) < PLAN.rates + PLAN.seeds
    # As if it had been in the middle of a line.
    with (tmp_path / f"{TASK}.jsonl").open("a") as file:
        file.write('{"kind": "tri')
    process = start(tmp_path, "--resume")
    said = stop(process, tmp_path, len(before) + 2, signal.SIGINT)
    assert process.returncode == 130
    assert "repeat the command with it" in said
    assert "Traceback" not in said
    assert __main__.main([*SWEEP, "--out", str(tmp_path), "--resume"]) == 0
    straight: list[Trial] = []
    trials = Trials(task, "unit_scale", PLAN.steps(task), task.batch_size)

    def run(*setting):
        straight.append(trials.run(*setting))
        return straight[-1]

    tune(run, task, CONTENDERS["unit_scale"], PLAN)
    found = session.trials(Log(tmp_path / f"{TASK}.jsonl"))
    assert [dataclasses.replace(trial, seconds=0) for trial in found] == [
        dataclasses.replace(trial, seconds=0) for trial in straight
    ]
    assert outcomes(tmp_path)[: len(before)] == before
    result = json.loads((tmp_path / "compare.json").read_text())[TASK]
    assert [place["optimizer"] for place in result["standings"]] == ["unit_scale"]
    assert (result["metric"], result["steps"]) == ("accuracy [%]", 300)
    assert (tmp_path / f"{TASK}.png").stat().st_size > 10_000
    assert (tmp_path / "compare.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds a run; add --resume"),
        (["--resume", "--preset", "cpu"], "has steps 300, not 3000; repeat its options"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(tmp_path, capsys, options, message):
    entry = {"kind": "sweep", **about(TASK, tasks.load(TASK), PLAN)}
    (tmp_path / f"{TASK}.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["compare", "--task", TASK, "--out", str(tmp_path), *options])
    assert message in " ".join(capsys.readouterr().err.split())


def test_earlier_results_can_be_read_and_gone_on_with():
    folder = ROOT / "benchmarks/results/cpu-2-cores"
    files = [*folder.glob("*/*.jsonl")]
    assert len(files) > 10
    assert all(session.trials(Log(path)) or path.parent.name == "train" for path in files)
    # Those of contenders that are no more are drawn too.
    results = json.loads((folder / "compare/compare.json").read_text())
    plt.close(plot_tasks(results))


def test_a_process_that_fails_is_reported():
    job = jobs.Job(f"nobody on {TASK}", functools.partial(work, TASK, "nobody", PLAN))
    with pytest.raises(UsageError, match=f"nobody on {TASK} ended with status 1"):
        list(jobs.run([job], 1))
