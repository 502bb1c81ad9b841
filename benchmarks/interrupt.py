"""Ctrl-C: an exception inside JAX's or an extension's callbacks can crash the interpreter."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["INTERRUPTED", "deferred", "immediate"]

# The exit status that shells give a command that Ctrl-C ended.
INTERRUPTED = 130


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Ctrl-C ends the process, for times when there is nothing to tidy up."""
    with _handled(lambda *_: os._exit(INTERRUPTED)):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, for the body to stop where it is safe; a second one ends the process.

    Yields:
      The event.
    """
    stop = threading.Event()

    def handler(*_: Any) -> None:
        if stop.is_set():
            os._exit(INTERRUPTED)
        stop.set()

    with _handled(handler):
        yield stop


@contextlib.contextmanager
def _handled(handler: Callable[..., None]) -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
