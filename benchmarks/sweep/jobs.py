"""Processes side by side: one for each CPU core, or one for a device."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from benchmarks.arguments import UsageError
from benchmarks.sweep.trial import Trial, Trials

# Trains at a learning rate with a seed, and perhaps a weight decay.
Run = Callable[..., Trial]
# Makes a `Run` that tells what comes out, and repeats nothing.
Remember = Callable[[Trials], Run]


class Job(NamedTuple):
    """All trials of one optimizer on one task, by what it is given, but for those `done` before.

    `work` is a function of a module, or a `partial` of one.
    """

    title: str
    work: Callable[[Remember], object]
    done: Sequence[Trial] = ()


def run(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Trial]]:
    """Runs each job in a process of its own, so many at a time, which share the CPU's cores out.

    Yields the place of a job, and a trial of it that has ended. A process that fails raises a
    UsageError.
    """
    context = multiprocessing.get_context("spawn")
    waiting, free = list(enumerate(jobs)), list(range(workers))
    running: dict[connection.Connection, tuple[Job, int, int, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and free:
                (index, job), turn = waiting.pop(0), free.pop(0)
                news, end = context.Pipe(duplex=False)
                arguments = job, end, turn, workers
                process = context.Process(target=_start, args=arguments, daemon=True)
                # Ctrl-C reaches the whole group, but what starts while it is ignored ignores it.
                previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
                process.start()
                signal.signal(signal.SIGINT, previous)
                end.close()
                running[news] = job, index, turn, process
            ready = connection.wait(list(running))
            for news in [x for x in running if x in ready]:
                job, index, turn, process = running[news]
                try:
                    yield index, news.recv()
                except EOFError:
                    del running[news]
                    free.append(turn)
                    process.join()
                    if process.exitcode:
                        how = f"ended with status {process.exitcode}"
                        text = f"{job.title} {how}; what it printed stands above"
                        raise UsageError(text) from None
    finally:
        for *_, process in running.values():
            process.terminate()


def _start(job: Job, news: connection.Connection, turn: int, workers: int) -> None:
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        # Before JAX's first computation, at which it counts them.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[turn::workers] or cores)
    known = {(trial.learning_rate, trial.seed, trial.decay): trial for trial in job.done}

    def remember(trials: Trials) -> Run:
        def trial(learning_rate: float, seed: int, decay: float | None = None) -> Trial:
            key = learning_rate, seed, decay
            if key not in known:
                known[key] = trials.run(*key)
                # Fails where the first process was killed, and nobody would write the trial down.
                news.send(known[key])
            return known[key]

        return trial

    job.work(remember)
