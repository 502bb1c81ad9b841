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
from jax.sharding import Mesh

from benchmarks.arguments import UsageError, add, count
from benchmarks.training.sharding import make_mesh

# A process that is silent for so long counts as dead, and takes the others along.
HEARTBEAT_SECONDS = 30
ADVICE = "Start all of them again with --resume to go on from the last checkpoint."
_notified = threading.Event()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options that spread a run over devices and processes."""
    what = (
        "train on N times M devices, virtual ones where there is only a CPU: batches are split "
        "over all, parameters over fsdp (default: one device; with --coordinator data, over the "
        "devices of all processes)"
    )
    add(parser, "--mesh data=N,fsdp=M", what, _mesh_sizes)
    what = (
        "address where the first of several processes listens, or auto to take it from Slurm, Open "
        "MPI, Kubernetes or Cloud TPU. All processes need the same options and --out, a folder "
        "that they share"
    )
    add(parser, "--coordinator HOST:PORT", what)
    add(parser, "--processes N", "how many processes meet at --coordinator", count())
    what = "which of them this is, from 0 to N-1; 0 writes the metrics and the figures"
    add(parser, "--process-id K", what, count(0))


def _mesh_sizes(text: str) -> dict[str, int]:
    """Sizes of a mesh's axes, such as "data=2,fsdp=4", each at most once."""
    pairs = re.findall(r"(data|fsdp)=([1-9]\d{0,8}),", f"{text},")
    if ",".join(map("=".join, pairs)) != text or len(dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"expected sizes such as data=2,fsdp=2, got {text!r}")
    return {axis: int(size) for axis, size in pairs}


def check_arguments(options: argparse.Namespace, batch_size: int) -> None:
    """Raises a UsageError for options that do not fit together, before anything is started."""
    where, number, index = options.coordinator, options.processes, options.process_id
    for name, value in (("--processes", number), ("--process-id", index)):
        if where is None and value is not None:
            raise UsageError(f"argument {name}: needs --coordinator")
    if where and options.out is None:
        raise UsageError("argument --coordinator: needs --out, a folder that all processes share")
    if where not in (None, "auto"):
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
            text = f"{devices} devices cannot be shared out evenly among {number} processes"
            raise UsageError(f"argument --mesh: {text}")


def _check_batch(devices: int, batch_size: int) -> None:
    if batch_size % devices:
        text = f"{batch_size} cannot be shared out evenly among {devices} devices"
        raise UsageError(f"argument --batch-size: {text}")


@contextlib.contextmanager
def joined(options: argparse.Namespace, batch_size: int) -> Iterator[Mesh | None]:
    """Meets the other processes, where the options say so; the mesh of all their devices, if any.

    Where another process dies, JAX notices first, says so, and aborts; or an operation fails here,
    and one line says why.
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


def stopped(stop: threading.Event, moment: int) -> bool:
    """Whether to stop now: all processes at the same moment once Ctrl-C has set `stop` in one.

    `moment` grows from call to call, and is equal on all processes.
    """
    if jax.process_count() == 1:
        return stop.is_set()
    if stop.is_set() and not _notified.is_set():
        _notified.set()
        # What JAX takes for a preemption and tells the other processes.
        signal.raise_signal(signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(moment)


def _connect(options: argparse.Namespace) -> None:
    where = None if options.coordinator == "auto" else options.coordinator
    # The other processes may be minutes away, and JAX waits where Python sees no signals.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        number, index = options.processes, options.process_id
        jax.distributed.initialize(
            where, number, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
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


def check_same(same: Any) -> None:
    """Raises a UsageError unless `same`, by its `repr`, is equal on all processes."""
    digest = np.uint32(zlib.crc32(repr(same).encode()))
    if np.ptp(multihost_utils.process_allgather(digest)):
        raise UsageError("the processes have different options, or see different files in --out")
