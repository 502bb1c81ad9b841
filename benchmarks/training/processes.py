"""Several processes that train as one: how they meet, stop together, and end when one dies."""

import argparse
import contextlib
import math
import os
import re
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.arguments import UsageError, count, mesh_sizes
from benchmarks.training.sharding import AXES, make_mesh

__all__ = [
    "ADVICE",
    "add_arguments",
    "check_arguments",
    "check_same",
    "is_first",
    "joined",
    "stopped",
]

# A process that is silent for so long counts as dead, and takes the others along.
HEARTBEAT_SECONDS = 30
ADVICE = "Start all of them again with --resume to go on from the last checkpoint."
_notified = threading.Event()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options that spread a run over devices and processes."""
    parser.add_argument(
        "--mesh",
        type=mesh_sizes(AXES),
        metavar="data=N,fsdp=M",
        help="train on N times M devices, virtual ones where there is only a CPU: batches are "
        "split over all, parameters over fsdp (default: one device; with --coordinator "
        "data, over the devices of all processes)",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="train with several processes that meet there, where the first listens; or auto: as "
        "Slurm, Open MPI, Kubernetes or Cloud TPU say. All need the same options and --out, a "
        "folder that they share",
    )
    parser.add_argument(
        "--processes", type=count(), metavar="N", help="how many processes meet at --coordinator"
    )
    parser.add_argument(
        "--process-id",
        type=count(0),
        metavar="K",
        help="which of them this is, from 0 to N-1; 0 writes the metrics and the figures",
    )


def check_arguments(options: argparse.Namespace, batch_size: int) -> None:
    """Raises a UsageError for options that do not fit together, before anything is started."""
    where, number, index = options.coordinator, options.processes, options.process_id
    if where is None:
        for name, value in (("--processes", number), ("--process-id", index)):
            if value is not None:
                raise UsageError(f"argument {name}: needs --coordinator")
    elif options.out is None:
        raise UsageError("argument --coordinator: needs --out, a folder that all processes share")
    elif where != "auto":
        if not re.fullmatch(r".+:\d{1,5}", where):
            raise UsageError(f"argument --coordinator: expected HOST:PORT or auto, got {where!r}")
        if number is None or index is None:
            raise UsageError("argument --coordinator: needs --processes and --process-id, or auto")
    if number is not None and index is not None and index >= number:
        raise UsageError(f"argument --process-id: expected 0 to {number - 1}, got {index}")
    if options.mesh is not None:
        devices = math.prod(options.mesh.values())
        _check_batch(devices, batch_size)
        if devices % (number or 1):
            raise UsageError(
                f"argument --mesh: {devices} devices cannot be shared out evenly among {number} "
                "processes"
            )


@contextlib.contextmanager
def joined(options: argparse.Namespace, batch_size: int) -> Iterator[Mesh | None]:
    """Meets the other processes, where the options say so, and ends with one line if that fails.

    Where another process dies, JAX notices first, says so, and aborts; or an operation fails here.

    Args:
      options: of the command.
      batch_size: examples in a batch.

    Yields:
      The mesh of all their devices, None where one device is enough.
    """
    if options.coordinator is None:
        yield None if options.mesh is None else _make_mesh(options, batch_size)
        return
    try:
        _connect(options)
        yield _make_mesh(options, batch_size)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, UsageError):
            reason = f"another process died, or this one cannot go on: {reason}. {ADVICE}"
            if not isinstance(error, jax.errors.JaxRuntimeError):
                traceback.print_exc()
        # A progress bar may stand on the last line.
        print(f"\npython -m benchmarks train: {reason}", file=sys.stderr, flush=True)
        # JAX's own end would wait for the others.
        os._exit(2 if isinstance(error, UsageError) else 1)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def stopped(stop: threading.Event, moment: int) -> bool:
    """Whether to stop now; all processes stop at the same moment once one is asked to.

    Args:
      stop: set by Ctrl-C.
      moment: a number that grows from call to call, equal on all processes.
    """
    if jax.process_count() == 1:
        return stop.is_set()
    if stop.is_set() and not _notified.is_set():
        _notified.set()
        # What JAX takes for a preemption and tells the other processes.
        signal.raise_signal(signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(moment)


def _connect(options: argparse.Namespace) -> None:
    automatic = options.coordinator == "auto"
    # The other processes may be minutes away, and JAX waits where Python sees no signals.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            None if automatic else options.coordinator,
            options.processes,
            options.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise UsageError(f"argument --coordinator: {options.coordinator}: {error}") from error
    finally:
        signal.signal(signal.SIGINT, previous)


def _make_mesh(options: argparse.Namespace, batch_size: int) -> Mesh:
    sizes = options.mesh
    if sizes is not None and (options.coordinator != "auto" or options.processes):
        # Accelerators are as many as there are; refused where JAX has started already.
        with contextlib.suppress(RuntimeError):
            devices = math.prod(sizes.values()) // (options.processes or 1)
            jax.config.update("jax_num_cpu_devices", devices)
    sizes = sizes or {"data": jax.device_count()}
    _check_batch(math.prod(sizes.values()), batch_size)
    try:
        return make_mesh(sizes)
    except ValueError as error:
        raise UsageError(f"argument --mesh: {error}") from error


def check_same(mesh: Mesh | None, same: Any) -> None:
    """Raises a UsageError unless `same`, by its `repr`, is equal on all processes."""
    if mesh is None:
        return
    digest = zlib.crc32(repr(same).encode())
    digests = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P(AXES)), lambda _: np.array([digest], np.uint32)
    )
    # Replicated, so that every process can read it.
    extremes = jax.jit(lambda x: (x.min(), x.max()), out_shardings=NamedSharding(mesh, P()))
    least, most = map(int, extremes(digests))
    if least != most:
        raise UsageError("the processes have different options, or see different files in --out")


def _check_batch(devices: int, batch_size: int) -> None:
    if batch_size % devices:
        raise UsageError(
            f"argument --batch-size: {batch_size} cannot be shared out evenly among {devices} "
            "devices"
        )
