"""Processes side by side: one for each CPU core, or one for a device."""

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

__all__ = ["News", "Tell", "run"]

# What a job calls: how much of a trial was done since the last call, and a trial that has ended.
Tell = Callable[[float, Any], None]


class News(NamedTuple):
    """What a job has to tell.

    Attributes:
      job: which one, by its place.
      share: how much of a trial was done since it last told.
      trial: one that has ended, or None.
    """

    job: int
    share: float
    trial: Any


def run(
    work: Callable[[Any, Tell], None], jobs: Sequence[Any], workers: int, stop: Callable[[], bool]
) -> Iterator[News]:
    """Runs each job in a process of its own.

    Args:
      work: runs one job; a function of a module.
      jobs: what to run, in this order.
      workers: processes at a time; several share the CPU's cores out among themselves.
      stop: asked a few times a second whether to end early.

    Yields:
      What the jobs have to tell.

    Raises:
      RuntimeError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    waiting = list(enumerate(jobs))
    running: dict[int, tuple[Any, BaseProcess]] = {}
    try:
        while (waiting or running) and not stop():
            for turn in range(workers):
                if waiting and turn not in running:
                    index, job = waiting.pop(0)
                    arguments = (work, index, job, news, turn, workers)
                    process = context.Process(target=_start, args=arguments, daemon=True)
                    process.start()
                    running[turn] = job, process
            # A process ends after its last news have arrived.
            ended = [turn for turn, (_, process) in running.items() if not process.is_alive()]
            yield from _waiting(news)
            for turn in ended:
                job, process = running.pop(turn)
                if process.exitcode:
                    raise RuntimeError(
                        f"{job} ended with status {process.exitcode}; what it printed stands above"
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


def _start(
    work: Callable[[Any, Tell], None], index: int, job: Any, news: Any, turn: int, workers: int
) -> None:
    # Ctrl-C reaches the whole group; the first process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        # Before JAX's first computation, at which it counts them.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[turn::workers] or cores)
    parent = multiprocessing.parent_process()

    def tell(share: float, trial: Any) -> None:
        if parent and not parent.is_alive():
            # It was killed, and nobody would write the trial down.
            os._exit(1)
        news.put(News(index, share, trial))

    work(job, tell)
