"""The update alone, as the compilers for TPU and GPU make it: what is sent, held and read."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import OURS, Program, compiled
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.lowering.programs import (
    Collective,
    all_product_flops,
    collectives,
    product_flops,
    reads,
    wire_bytes,
)
from benchmarks.lowering.topologies import TOPOLOGIES, make_mesh
from benchmarks.lowering.updates import (
    CONFIG,
    METHODS,
    compile_update,
    gradients,
    whole_update,
)
from benchmarks.models.gpt import GPTConfig
from optax_unitscale import unit_scale

pytest.importorskip("libtpu", reason="needs the extra aot")
pytest.importorskip("jax_cuda13_plugin", reason="needs the extra aot")

SMALL = GPTConfig(vocabulary=4096, context=256, depth=1, heads=16, width=2048)
# The kernels that are split over the mesh: ("fsdp", "tensor") and ("tensor", "fsdp").
ORDERS = 2


def split(program: Program) -> int:
    return sum(any(x.sharding.spec) for x in program.leaves)


def numbers(found: list[Collective]) -> int:
    return sum(size for x in found for _, size in x.inputs)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_devices_send_three_numbers_a_leaf_in_one_all_reduce_for_each_order_of_axes(
    topology, method
):
    program = compiled(TOPOLOGIES[topology], method)
    assert 1 <= len(program.collectives) <= ORDERS
    for x in program.collectives:
        assert (x.kind, x.group) == ("all-reduce", program.devices)
        assert {dtype for dtype, _ in x.inputs} == {"f32"}
    assert split(program) == 27
    assert numbers(program.collectives) == 3 * 27


@pytest.mark.parametrize("topology", ["TPU v5e, 256 chips", "H100, 256 GPUs"])
@pytest.mark.parametrize(("norm", "each"), [("l1", 3), ("linf", 1)])
def test_norms_without_squares_send_one_or_three_numbers_a_leaf(norm, each, topology):
    program = compiled(TOPOLOGIES[topology], unit_scale(norm))
    assert {(x.kind, x.group) for x in program.collectives} == {("all-reduce", program.devices)}
    assert numbers(program.collectives) == each * split(program)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_nothing_depends_on_a_branch(topology, method):
    assert "conditional(" not in compiled(TOPOLOGIES[topology], method).text


@pytest.mark.parametrize("shape", [(), (1,), (300,), (64, 128)])
@pytest.mark.parametrize("platform", ["TPU v5e, 256 chips", "H100, 8 GPUs"])
def test_compilers_do_not_square_the_powers_of_two_which_would_leave_the_range(platform, shape):
    mesh = make_mesh(TOPOLOGIES[platform])
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P()))
    text = compile_update(unit_scale(), {"x": leaf}).as_text() or ""
    constants = {np.float32(x) for x in re.findall(r"constant\(\{?([-+.\de]+)\}?\)", text)}
    assert {np.float32(2.0**80), np.float32(2.0**-100)} <= constants


@pytest.mark.parametrize(
    ("norm", "dtype"),
    # The compiler refuses integers of float64, and dies of a complex128's magnitude.
    [("l2", "float64"), ("rms", "float64"), ("l1", "float64"), ("l2", "complex128")],
)
def test_float64_compiles_for_tpu_too(norm, dtype):
    with jax.enable_x64(True):
        mesh = make_mesh(TOPOLOGIES["TPU v5e, 256 chips"])
        leaf = jax.ShapeDtypeStruct((8, 300), dtype, sharding=NamedSharding(mesh, P()))
        assert compile_update(unit_scale(norm), {"x": leaf}).as_text()


@pytest.mark.parametrize("shape", [(), (1,), (300,)])
@pytest.mark.parametrize("platform", ["TPU v5e, 256 chips", "H100, 8 GPUs"])
def test_compilers_do_not_square_what_a_leaf_is_multiplied_by(platform, shape):
    mesh = make_mesh(TOPOLOGIES[platform])
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P()))
    by = np.float32(1e-15)
    times = optax.stateless(lambda updates, _: jax.tree.map(lambda x: x * by, updates))
    text = compile_update(optax.chain(times, unit_scale()), {"x": leaf}).as_text() or ""
    constants = {np.float32(x) for x in re.findall(r"constant\(\{?([-+.\de]+)\}?\)", text)}
    assert by in constants
    assert not any(0.99 < float(x) / float(by) ** 2 < 1.01 for x in constants)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("platform", ["TPU v5e, 256 chips", "H100, 256 GPUs"])
def test_where_all_leaves_are_split_alike_there_is_one_all_reduce(platform, method):
    mesh = make_mesh(TOPOLOGIES[platform])
    tree = gradients(CONFIG, mesh)
    alike = [x for x in jax.tree.leaves(tree) if x.sharding.spec[:1] == ("fsdp",)]
    text = compile_update(METHODS[method], alike).as_text()
    assert len(alike) > 10
    found = collectives(text or "", mesh.size)
    assert [x.kind for x in found] == ["all-reduce"]
    assert numbers(found) == 3 * len(alike)


def dividing() -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda x: x / jnp.linalg.norm(x), updates)
    )


def test_sums_of_bfloat16_leaves_are_sent_in_float32_where_the_naive_ones_are_not():
    def sent(method: Any) -> set[str]:
        program = compiled(TOPOLOGIES["TPU v5e, 256 chips"], method, SMALL, jnp.bfloat16)
        return {dtype for x in program.collectives for dtype, _ in x.inputs}

    assert sent("unit_scale()") == {"f32"}
    assert "bf16" in sent(dividing())


def flattening() -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda x: x * jax.lax.rsqrt(jnp.vdot(x, x)), updates)
    )


@pytest.mark.parametrize("topology", ["TPU v5e, 256 chips", "H100, 256 GPUs"])
def test_a_norm_of_flattened_leaves_is_seen_to_gather_on_gpu_and_ours_is_not(topology):
    kinds = {x.kind for x in compiled(TOPOLOGIES[topology], flattening(), SMALL).collectives}
    assert ("all-gather" in kinds) == topology.startswith("H100"), kinds


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_donated_gradients_are_overwritten_by_their_updates(topology, method):
    memory = compiled(TOPOLOGIES[topology], method).memory
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes > 5e6


NAIVE = dict(zip(OURS, ["x * rsqrt(sum(x * x))", "x * rsqrt(sum of all x * x)"], strict=True))


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_part_that_fits_on_the_chip_is_read_as_often_as_by_the_naive_formula(topology, method):
    ours, naive = (compiled(TOPOLOGIES[topology], name) for name in (method, NAIVE[method]))
    count, least = (reads(x.text, len(x.leaves)) for x in (ours, naive))
    # Compilers decide leaf by leaf what stays on the chip.
    assert count <= least + 0.03


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1024, 1024), P(("fsdp", "tensor"))),
        ((4096, 1024), P("tensor", "fsdp")),
        ((768, 1024), P(("fsdp", "tensor"))),
        ((97, 1024), P(None, "fsdp")),
    ],
)
@pytest.mark.parametrize("topology", ["H100, 8 GPUs", "H100, 256 GPUs"])
def test_norms_of_columns_that_devices_share_move_sums_only(topology, shape, spec):
    mesh = make_mesh(TOPOLOGIES[topology])
    leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    text = compile_update(unit_scale(axis=0), {"x": leaf}).as_text() or ""
    # Four for each column, in float64.
    columns = NamedSharding(mesh, P(*spec[1:])).shard_shape(shape[1:])[0]
    sent = collectives(text, mesh.size)
    assert {dtype for x in sent for dtype, _ in x.inputs} <= {"f64"}
    assert numbers(sent) <= 8 * columns < math.prod(shape) / 2


# 16 matrices of one shape and 9 of another. On 8 GPUs all but one are dealt out, on 256 each is
# shared by the devices along one mesh axis, of which 7 of 16, or 16 and 23 of 32, have none.
@pytest.mark.parametrize(
    ("topology", "most"),
    [("H100, 8 GPUs", 1.0), ("H100, 256 GPUs", 2.98), ("TPU v5e, 256 chips", 1.49)],
)
def test_devices_share_the_products_of_large_matrices(topology, most):
    program = compiled(TOPOLOGIES[topology], "orthogonalize()")
    updates = gradients(CONFIG, make_mesh(TOPOLOGIES[topology]))
    whole = all_product_flops(whole_update(METHODS["orthogonalize()"], updates))
    assert product_flops(program.text) * program.devices <= most * whole
    # Of a matrix that is shared 8 bytes for each element of its square, in each of the 5 steps.
    width = CONFIG.width
    assert sum(map(wire_bytes, program.collectives)) < 1.1 * 2 * 5 * 8 * width * width
