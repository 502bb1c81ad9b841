"""Ends a process with one clear line where JAX, or a library below it, would abort at length."""

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

__all__ = ["catch_abort", "divert_libraries", "end", "watched"]

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []
_watchers: list[subprocess.Popen[bytes]] = []
# Its input ends with the process that it watches, which before it ends well says so.
_WATCHER = "import sys\nif not sys.stdin.read(): sys.stderr.write('\\n' + sys.argv[1])"
_ending = threading.Lock()


def divert_libraries(folder: pathlib.Path) -> pathlib.Path:
    """Sends what is not written through `sys.stdout` and `sys.stderr` to a new file."""
    descriptor, path = tempfile.mkstemp(".log", "process-", folder)
    sys.stdout, sys.stderr = (_apart(stream, descriptor) for stream in (sys.stdout, sys.stderr))
    os.close(descriptor)
    return pathlib.Path(path)


def _apart(stream: TextIO, descriptor: int) -> TextIO:
    """A stream to where `stream` goes, whose own file descriptor then goes elsewhere."""
    stream.flush()
    number = os.dup(stream.fileno())
    os.dup2(descriptor, stream.fileno())
    return open(number, "w", 1, stream.encoding, stream.errors, closefd=False)


def catch_abort(line: str) -> None:
    """Prints a line instead of what the C library's abort() leaves behind."""
    # JAX answers the death of a process by abort() in a thread of its own, which Python's signal
    # handlers do not survive to see.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, _Handler)
    libc.signal.restype = ctypes.c_void_p
    _handlers.append(_Handler(lambda _: end(line)))
    libc.signal(signal.SIGABRT, _handlers[-1])


@contextlib.contextmanager
def watched(line: str) -> Iterator[None]:
    """Has another process print a line if this one ends without a word, as JAX 0.8 ends it."""
    command = [sys.executable, "-S", "-c", _WATCHER, line]
    # In a session of its own, where no Ctrl-C reaches it.
    watcher = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=sys.stderr.fileno(), start_new_session=True
    )
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
        watcher.communicate(b"done")


def end(line: str) -> NoReturn:
    """Ends the process at once: JAX's own end would wait for those that died."""
    with _ending:
        # A progress bar may stand on the last line. The watchers are told afterwards, for a thread
        # of JAX's may end the process at any moment.
        os.write(sys.stderr.fileno(), f"\n{line}".encode())
        for watcher in _watchers:
            if watcher.stdin:
                os.write(watcher.stdin.fileno(), b"done")
        os._exit(1)
