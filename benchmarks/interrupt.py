"""Ctrl-C: an exception inside JAX's or an extension's callbacks can crash the interpreter."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

# The exit status that shells give a command that Ctrl-C ended.
INTERRUPTED = 130


@contextlib.contextmanager
def deferred(*, at_once: bool = False) -> Iterator[threading.Event]:
    """Ctrl-C sets the event, for the body to stop where it is safe; a second one ends the process.

    With `at_once` the first one does, for times when there is nothing to tidy up.
    """
    stop = threading.Event()

    def handler(*_: Any) -> None:
        if at_once or stop.is_set():
            os._exit(INTERRUPTED)
        stop.set()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
