"""The update on one chip, as the compilers for TPU and GPU make it: what is held and read."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled import OURS, compiled
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.lowering.programs import reads
from benchmarks.lowering.topologies import Topology, make_mesh
from benchmarks.lowering.updates import compile_update
from benchmarks.models.gpt import GPTConfig
from optax_unitscale import unit_scale

pytest.importorskip("libtpu", reason="needs the extra aot")
pytest.importorskip("jax_cuda13_plugin", reason="needs the extra aot")

# 2.0 GB, of which a TPU holds 2**27 bytes on the chip; XLA counts what it uses there as temporary.
LARGE = GPTConfig(vocabulary=8192, context=2048, depth=2, heads=32, width=4096)
ONE_CHIP = {
    "v5e": (Topology("tpu", "v5e:2x2", 1, 1), 2**27 + 2**22),
    "v6e": (Topology("tpu", "v6e:2x2", 1, 1), 2**27 + 2**22),
    "v5p": (Topology("tpu", "v5p:2x2x1", 1, 1), 2**27 + 2**22),
    "H100": (Topology("cuda", "1x1x1", 1, 1), 2**18),
}


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize(("chip", "most"), ONE_CHIP.values(), ids=ONE_CHIP)
def test_temporaries_do_not_grow_with_the_gradient(chip, most, method):
    memory = compiled(chip, method, LARGE).memory
    assert memory.temp_size_in_bytes < most < memory.argument_size_in_bytes / 10


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize(("chip", "most"), ONE_CHIP.values(), ids=ONE_CHIP)
def test_a_large_gradient_is_read_once_for_its_norms_and_once_to_be_scaled(chip, most, method):
    program = compiled(chip, method, LARGE)
    assert reads(program.text, len(program.leaves)) <= 2.0


# XLA:GPU writes integers to memory before it takes the largest of columns.
@pytest.mark.parametrize(
    ("chip", "norm"),
    [("v5e", "l2"), ("v5e", "l1"), ("v5e", "linf"), ("H100", "l2"), ("H100", "l1")],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2048, 2048), 1),
        ((1001, 768), 0),
        ((8, 512, 1024), (0, 1)),
        ((3, 3, 256, 256), (0, 1, 2)),
    ],
)
def test_norms_of_rows_columns_and_blocks_read_a_leaf_once(chip, shape, axis, dtype, norm):
    chip, most = ONE_CHIP[chip]
    on_chip = NamedSharding(make_mesh(chip), P())
    leaf = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=on_chip)
    program = compile_update(unit_scale(norm, axis=axis), {"x": leaf})
    assert reads(program.as_text() or "", 1) <= 2.0
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes < max(most, memory.argument_size_in_bytes / 16)
