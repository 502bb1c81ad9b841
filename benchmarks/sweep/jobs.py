"""The trials of a sweep, spread over processes: one for each CPU core, or one for a device."""

import dataclasses
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

__all__ = ["Job", "News", "Plan", "run"]


class Plan(NamedTuple):
    """How much a sweep spends on each optimizer.

    Attributes:
      rates: learning rates to try, with seed 0.
      seeds: further seeds at the best of them.
      length: how many times a task's steps in a sweep.
      batch_size: how many times a task's batch size.
    """

    rates: int
    seeds: int
    length: float
    batch_size: int


class Job(NamedTuple):
    """All trials of one optimizer on one task.

    Attributes:
      task: its name.
      optimizer: its name.
      done: the trials that an earlier sweep has, as JSON objects.
    """

    task: str
    optimizer: str
    done: Sequence[dict[str, Any]] = ()


class News(NamedTuple):
    """What a process has to tell.

    Attributes:
      task: of its job.
      optimizer: of its job.
      share: how much of a trial was done since it last told.
      trial: one that has ended, as a JSON object.
    """

    task: str
    optimizer: str
    share: float = 0.0
    trial: dict[str, Any] | None = None


def run(jobs: Sequence[Job], plan: Plan, workers: int, stop: Callable[[], bool]) -> Iterator[News]:
    """Runs what is missing of each job, each in a process of its own.

    Args:
      jobs: what to run, in this order.
      plan: how much of it.
      workers: processes at a time; several share the CPU's cores out among themselves.
      stop: asked a few times a second whether to end early.

    Yields:
      What the processes have to tell.

    Raises:
      RuntimeError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    waiting = list(jobs)
    running: dict[int, tuple[Job, BaseProcess]] = {}
    try:
        while (waiting or running) and not stop():
            for turn in set(range(workers)) - set(running):
                if waiting:
                    job = waiting.pop(0)
                    process = context.Process(target=_work, args=(job, plan, news, turn, workers))
                    process.start()
                    running[turn] = job, process
            # A process ends after its last news have arrived.
            ended = [turn for turn, (_, process) in running.items() if not process.is_alive()]
            yield from _waiting(news)
            for turn in ended:
                job, process = running.pop(turn)
                if process.exitcode:
                    raise RuntimeError(
                        f"{job.optimizer} on {job.task} ended with status {process.exitcode}; "
                        "what it says of it stands above"
                    )
    finally:
        for _, process in running.values():
            process.terminate()


def _waiting(news: Any) -> Iterator[News]:
    timeout = 0.2
    while True:
        try:
            yield news.get(timeout=timeout)
        except queue.Empty:
            return
        timeout = 0.0


def _work(job: Job, plan: Plan, news: Any, turn: int, workers: int) -> None:
    # Ctrl-C reaches the whole group; the first process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[turn::workers] or cores)
    # Only now, for JAX counts the cores when it starts.
    from benchmarks import tasks
    from benchmarks.sweep import search
    from benchmarks.sweep.trial import Trial, Trials

    task = tasks.load(job.task)
    trials = Trials(
        task,
        job.optimizer,
        max(1, round(task.sweep * plan.length)),
        task.batch_size * plan.batch_size,
    )
    done = {(t.learning_rate, t.seed): t for t in (Trial(**entry) for entry in job.done)}

    def trial(rate: float, seed: int) -> Trial:
        if (rate, seed) not in done:
            done[rate, seed] = trials.run(rate, seed, lambda share: tell(share=share))
            tell(trial=dataclasses.asdict(done[rate, seed]))
        return done[rate, seed]

    parent = multiprocessing.parent_process()

    def tell(**what: Any) -> None:
        if parent and not parent.is_alive():
            # It was killed, and nobody would write the trials down.
            os._exit(1)
        news.put(News(job.task, job.optimizer, **what))

    search.tune(trial, task, job.optimizer, plan.rates, plan.seeds)
