"""Accelerators to compile for, none of which has to be there: the extra `aot` is enough."""

import importlib.util
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

AXES = ("fsdp", "tensor")
# What libtpu would otherwise ask a TPU's host for, or wait for.
_WITHOUT_A_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# A GpuTargetConfig, as XLA writes it on a machine that has the GPU.
_H100 = pathlib.Path(__file__).with_name("h100.txtpb")


class Topology(NamedTuple):
    """Chips as libtpu names them, or slices x hosts x GPUs a host; the mesh laid over them."""

    platform: str
    layout: str
    fsdp: int
    tensor: int


TOPOLOGIES = {
    "TPU v5e, 256 chips": Topology("tpu", "v5e:16x16", 16, 16),
    "TPU v6e, 256 chips": Topology("tpu", "v6e:16x16", 16, 16),
    "TPU v5p, 4096 chips": Topology("tpu", "v5p:16x16x16", 256, 16),
    "H100, 8 GPUs": Topology("cuda", "1x1x8", 1, 8),
    "H100, 256 GPUs": Topology("cuda", "1x32x8", 32, 8),
}
_COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}


def is_installed(topology: Topology) -> bool:
    """Whether the compiler for this topology is there."""
    return importlib.util.find_spec(_COMPILERS[topology.platform]) is not None


def make_mesh(topology: Topology) -> Mesh:
    """The mesh of `fsdp` by `tensor` over the first of the topology's devices.

    Programs can be compiled for it, but not run; everything else in the process runs on CPU.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(_WITHOUT_A_TPU)
    if topology.platform == "tpu":
        more = {"topology_name": topology.layout}
    else:
        gpu = {"target_config": _H100.read_text(), "topology": topology.layout}
        more = {"topology_name": "", **gpu}
    found = topologies.get_topology_desc(platform=topology.platform, **more)
    count = topology.fsdp * topology.tensor
    return Mesh(np.array(found.devices[:count]).reshape(topology.fsdp, topology.tensor), AXES)
