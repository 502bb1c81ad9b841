"""Processes side by side: one for each CPU core, or one for a device."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from benchmarks.arguments import UsageError
from benchmarks.sweep.trial import Trial, Trials

__all__ = ["Job", "Remember", "Run", "run"]

# Trains at a learning rate with a seed.
Run = Callable[[float, int], Trial]
# Makes a `Run` that tells what comes out, and repeats nothing.
Remember = Callable[[Trials], Run]


class Job(NamedTuple):
    """All trials of one optimizer on one task.

    Attributes:
      title: what errors and the progress bar say.
      work: runs them, by what it is given; a function of a module, or a `partial` of one.
      done: those that an earlier sweep has.
    """

    title: str
    work: Callable[[Remember], object]
    done: Sequence[Trial] = ()


def run(
    jobs: Sequence[Job], workers: int, stop: Callable[[], bool]
) -> Iterator[tuple[int, Trial | None]]:
    """Runs each job in a process of its own.

    Args:
      jobs: what to run, in this order.
      workers: processes at a time; several share the CPU's cores out among themselves.
      stop: asked a few times a second whether to end early.

    Yields:
      The place of a job, and a trial of it that has ended; None at the job's end.

    Raises:
      UsageError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(enumerate(jobs))
    free = list(range(workers))
    running: dict[connection.Connection, tuple[int, int, BaseProcess]] = {}
    # On Python 3.11 its start would let Ctrl-C through below.
    resource_tracker.ensure_running()
    try:
        while (waiting or running) and not stop():
            while waiting and free:
                index, turn = waiting[0][0], free[0]
                news, end = context.Pipe(duplex=False)
                arguments = (waiting.pop(0)[1], end, free.pop(0), workers)
                process = context.Process(target=_start, args=arguments, daemon=True)
                # Ctrl-C reaches the whole group, but never what starts while it is blocked; the
                # first process ends the others.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                process.start()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                end.close()
                running[news] = index, turn, process
            ready = connection.wait(list(running), timeout=0.2)
            for news in [x for x in running if x in ready]:
                index, turn, process = running[news]
                try:
                    yield index, news.recv()
                except EOFError:
                    del running[news]
                    free.append(turn)
                    process.join()
                    if process.exitcode:
                        raise UsageError(
                            f"{jobs[index].title} ended with status {process.exitcode}; what it "
                            "printed stands above"
                        ) from None
                    yield index, None
    finally:
        for _, _, process in running.values():
            process.terminate()


def _start(job: Job, news: connection.Connection, turn: int, workers: int) -> None:
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        # Before JAX's first computation, at which it counts them.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[turn::workers] or cores)
    known = {(trial.learning_rate, trial.seed): trial for trial in job.done}

    def remember(trials: Trials) -> Run:
        def trial(learning_rate: float, seed: int) -> Trial:
            key = (learning_rate, seed)
            if key not in known:
                known[key] = trials.run(*key)
                try:
                    news.send(known[key])
                except OSError:
                    # The first process was killed, and nobody would write the trial down.
                    os._exit(1)
            return known[key]

        return trial

    job.work(remember)
