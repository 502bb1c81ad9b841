"""Models that differ in one size, and how far the best learning rate moves with it.

A learning rate found on the smallest may carry over.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks import show
from benchmarks.models.classifiers import MLP
from benchmarks.models.gpt import GPT, GPTConfig
from benchmarks.sweep.search import SEEDS
from benchmarks.sweep.trial import Trial
from benchmarks.tasks import Task, language_modelling, vanishing


class Member(NamedTuple):
    """One size of a family: a task, and the steps and batch size of its runs."""

    task: Task
    steps: int
    batch_size: int


class Family(NamedTuple):
    """Models, or runs, that differ in one size."""

    what: str  # The size counts.
    sizes: tuple[int, ...]
    member: Callable[[int, float], Member]  # From a size and how many times the steps.


def _gpt(steps: float, width: int = 64, depth: int = 2, batch_size: int = 8) -> Member:
    vocabulary, context = language_modelling.CONFIG.vocabulary, language_modelling.CONFIG.context
    config = GPTConfig(vocabulary, context, depth, width // 32, width)
    task = _unmeasured(language_modelling.load(), lambda seed: GPT(config, nnx.Rngs(seed)))
    return Member(task, round(steps), batch_size)


def _mlp(steps: float, width: int) -> Member:
    task = _unmeasured(
        vanishing.load(), lambda seed: MLP(64, width, 3, 10, nnx.relu, nnx.Rngs(seed))
    )
    return Member(task, round(steps), 64)


def _unmeasured(task: Task, model: Callable[[int], nnx.Module]) -> Task:
    """Without a metric: what counts is the training loss, which is less noisy."""
    return dataclasses.replace(task, model=model, evaluate=lambda *_: math.nan)


FAMILIES = {
    "gpt_width": Family(
        "width of a GPT, 2 blocks",
        (32, 64, 128, 256, 512),
        lambda size, length: _gpt(200 * length, width=size),
    ),
    "gpt_depth": Family(
        "blocks of a GPT of width 64",
        (2, 4, 8, 16),
        lambda size, length: _gpt(200 * length, depth=size),
    ),
    "mlp_width": Family(
        "width of an MLP on digits, 3 hidden layers",
        (64, 256, 1024),
        lambda size, length: _mlp(60 * length, size),
    ),
    "gpt_batch": Family(
        "sequences in a batch of a GPT of width 64",
        (4, 16, 64),
        lambda size, length: _gpt(200 * length, batch_size=size),
    ),
    "gpt_steps": Family(
        "steps of a GPT of width 64",
        (100, 400, 1600),
        # The size is the length.
        lambda size, _: _gpt(size),
    ),
}


class Best(NamedTuple):
    """A learning rate, the mean of its losses over the seeds, and their range."""

    learning_rate: float
    loss: float
    range: float


# By optimizer and size.
Found = Mapping[str, Mapping[int, Best]]


def best(trials: Sequence[Trial]) -> Best | None:
    """Of one optimizer and size: the best rate of those with every seed, none of which diverged."""
    losses: dict[float, dict[int, float]] = {}
    for trial in trials:
        losses.setdefault(trial.learning_rate, {})[trial.seed] = trial.loss
    whole = {
        rate: list(own.values())
        for rate, own in losses.items()
        if len(own) == SEEDS and all(map(math.isfinite, own.values()))
    }
    if not whole:
        return None
    rate = min(whole, key=lambda rate: sum(whole[rate]))
    return Best(rate, sum(whole[rate]) / SEEDS, max(whole[rate]) - min(whole[rate]))


def moves(results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """In Markdown, from what `transfer.json` holds: one row an optimizer, two numbers a family.

    The greatest of its best rates over the least, and its loss at the largest size.
    """
    families = [name for name in FAMILIES if results.get(name)]
    sizes = {
        name: sorted({int(size) for own in results[name].values() for size in own})
        for name in families
    }

    def cell(name: str, optimizer: str) -> str:
        own = results[name].get(optimizer)
        if not own:
            return "-"
        last = max(map(int, own))
        rates = [best["learning_rate"] for best in own.values()]
        text = f"{max(rates) / min(rates):.1f}, {own[str(last)]['loss']:.3g}"
        return text if last == sizes[name][-1] else f"{text} (to {last})"

    heads = [f"{name.replace('_', ' ')} {own[0]} to {own[-1]}" for name, own in sizes.items()]
    optimizers = dict.fromkeys(key for name in families for key in results[name])
    rows = [[f"`{x}`", *(cell(name, x) for name in families)] for x in optimizers]
    return show.markdown(["optimizer", *heads], rows)


def plot_losses(name: str, trials: Mapping[int, Sequence[Trial]], found: Found) -> Figure:
    """The loss against the learning rate, from the trials by size: a panel for each optimizer."""
    figure, panels = show.panels(len(found), 3, (3.3, 2.8), sharey=True)
    colors = plt.colormaps["viridis"]([i / max(1, len(trials)) for i in range(len(trials))])
    losses = []
    for panel, (optimizer, own) in zip(panels, found.items(), strict=True):
        for (size, tried), color in zip(trials.items(), colors, strict=True):
            points = _curve([trial for trial in tried if trial.optimizer == optimizer])
            panel.plot(*points, ".-", color=color, label=str(size), linewidth=1.2)
            losses += [value for value in points[1] if math.isfinite(value)]
            if size in own:
                panel.plot(*own[size][:2], "o", color=color, markersize=8)
        panel.set_title(optimizer, color=show.color(optimizer))
        panel.set(xscale="log", xlabel="peak learning rate")
        # Over less than a decade they would overlap.
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    low, high = min(losses), sorted(losses)[int(0.85 * (len(losses) - 1))]
    # Every best rate shows.
    high = max(high, *(best.loss for own in found.values() for best in own.values()))
    margin = 0.05 * (high - low)
    panels[0].set_ylim(low - margin, high + margin)
    figure.supylabel("training loss, last tenth [nats]")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title=name.replace("_", "\n"))
    figure.suptitle(
        f"{FAMILIES[name].what}; names in {show.LEGEND}\n"
        "large dots: the best rates; small: those tried; higher losses are cut off"
    )
    return figure


def _curve(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    """The learning rates, and the mean loss over the seeds at each; NaN where one diverged."""
    losses: dict[float, list[float]] = {}
    for trial in sorted(trials, key=lambda trial: trial.learning_rate):
        losses.setdefault(trial.learning_rate, []).append(trial.loss)
    means = [sum(own) / len(own) for own in losses.values()]
    return list(losses), [mean if math.isfinite(mean) else math.nan for mean in means]
