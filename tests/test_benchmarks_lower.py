"""`python -m benchmarks lower`: how it reads programs, its results, its refusals.

That it compiles for TPU and GPU is tested in tests/aot.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.__main__ import main
from benchmarks.lowering.programs import (
    Collective,
    all_product_flops,
    collectives,
    product_flops,
    reads,
    wire_bytes,
)
from benchmarks.lowering.topologies import TOPOLOGIES, is_installed
from benchmarks.lowering.updates import METHODS
from optax_unitscale import unit_scale

pytestmark = pytest.mark.slow

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "compiled"
RECORDED = json.loads((RESULTS / "lower.json").read_text())
INSTALLED = any(map(is_installed, TOPOLOGIES.values()))


def compiled(function, spec, shape=(16, 8)):
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2, devices=jax.devices("cpu"))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(function).lower(leaf).compile().as_text() or ""


def update(x):
    return unit_scale().update(x, optax.EmptyState())[0]


def test_the_all_reduce_of_a_norm_is_found_and_so_is_that_in_a_branch():
    # A leaf that is not small: those have no branch.
    found = collectives(compiled(update, P(("a", "b")), (64, 64)), 8)
    assert found == [Collective("all-reduce", (("f32", 1),), 8)] * 2


def test_the_devices_of_one_axis_are_counted():
    (found,) = collectives(compiled(lambda x: jnp.sum(x, axis=0), P("a")), 8)
    assert found == Collective("all-reduce", (("f32", 8),), 4)
    assert wire_bytes(found) == 2 * 32 * 3 / 4


GATHER = """
ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[16,8]{1,0} all-gather(%x), channel_id=1, replica_groups=GROUPS
}
"""


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0':(1)2,'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
    ],
)
def test_every_way_of_writing_who_takes_part_is_read(groups, size):
    (found,) = collectives(GATHER.replace("GROUPS", groups), 8)
    assert found == Collective("all-gather", (("f32", 32),), size)
    assert wire_bytes(found) == 128 * (size - 1)


def test_products_and_what_is_sent_in_loops_count_as_often_as_the_loop_runs():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2, devices=jax.devices("cpu"))

    def local(x, y):
        def step(x, _):
            return jax.lax.psum(x @ y, "a") @ y.T, None

        return jax.lax.scan(step, x, None, length=3)[0] @ y

    def batches(x, y):
        return jnp.einsum("bij,bjk->bik", x, y)

    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 24), (24, 40)))
    looped = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    assert all_product_flops(jax.make_jaxpr(looped)(x, y).jaxpr) == 7 * 2 * 16 * 24 * 40
    text = jax.jit(looped).lower(x, y).compile().as_text() or ""
    assert product_flops(text) == 7 * 2 * 16 * 24 * 40
    assert collectives(text, 8) == [Collective("all-reduce", (("f32", 16 * 40),), 4)] * 3
    x, y = (jax.ShapeDtypeStruct((5, *side.shape), jnp.float32) for side in (x, y))
    assert all_product_flops(jax.make_jaxpr(batches)(x, y).jaxpr) == 5 * 2 * 16 * 24 * 40
    text = jax.jit(batches).lower(x, y).compile().as_text() or ""
    assert product_flops(text) == 5 * 2 * 16 * 24 * 40


ON_TPU = """
%body (x: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %x = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%x), index=0
  %old = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%x), index=1
  %gram = f32[8,8]{1,0:T(8,128)} convolution(%old, %old), dim_labels=bf_oi->bf
  %new = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%gram, %old), dim_labels=bf_io->bf
  ROOT %pair = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%step, %new)
}

%condition (y: (s32[], bf16[8,16])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %y = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %now = s32[]{:T(128)} get-tuple-element(%y), index=0
  ROOT %less = pred[]{:T(512)} compare(%now, %five), direction=LT
}

ENTRY %main (start: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %while = (s32[], bf16[8,16]) while(%start), condition=%condition, body=%body
}
"""


def test_products_on_tpu_are_convolutions_and_loops_count_to_a_constant():
    assert product_flops(ON_TPU) == 5 * 2 * (2 * 8 * 8 * 16)
    with pytest.raises(ValueError, match="while has no count"):
        product_flops(ON_TPU.replace("constant(5)", "parameter(1)"))
    with pytest.raises(ValueError, match="gram is not known to be a product"):
        product_flops(ON_TPU.replace("dim_labels=bf_oi", "window={size=2}, dim_labels=bf_oi"))


COPIED = """
ENTRY %main (x: f32[8,128], y: f32[4,128], z: f32[512]) -> (f32[8,128], f32[4,128]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %y = f32[4,128]{1,0:T(4,128)} parameter(1)
  %z = f32[512]{0:T(512)} parameter(2)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %sum.1 = f32[]{:T(128)} fusion(%near), kind=kLoop, calls=%sum
  %bytes = s8[2048]{0} bitcast(%y)
  %half = ((s8[2048]{0}), s8[1024]{0:S(1)}, s32[]{:S(2)}) slice-start(%bytes), slice={[0:1024]}
  %sum.2 = f32[] fusion(%sum.1, /*index=1*/%near), kind=kLoop, calls=%sum
  %large.1 = f32[8,128]{1,0} fusion(%near, %sum.2), kind=kLoop, calls=%scale
  %small.1 = f32[4,128]{1,0} fusion(%y, %sum.2, %z), kind=kLoop, calls=%scale
  ROOT %result = (f32[8,128]{1,0}, f32[4,128]{1,0}) tuple(%large.1, %small.1)
}
"""


def test_copies_to_the_chip_slices_and_uses_count_as_reads():
    # The first once, by its copy; the second in half and then whole; the third does not count.
    assert reads(COPIED, leaves=2) == (4096 + 1024 + 2048) / (4096 + 2048)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_on_cpu_too_every_pass_over_the_gradient_is_counted(count):
    def passes(x):
        sums = []
        for _ in range(count):
            # What depends on the last sum cannot be taken with it.
            sums.append(jnp.sum(jnp.sin(x + (sums[-1] if sums else 0.0))))
        return sums[-1]

    program = jax.jit(passes).lower(jax.ShapeDtypeStruct((4096,), jnp.float32)).compile()
    assert reads(program.as_text() or "", leaves=1) == count


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_recorded_programs_hold_what_is_said_of_them(topology):
    rows = RECORDED["results"][topology]
    assert list(rows) == list(METHODS)
    for name in ("unit_scale()", 'unit_scale(scope="global")'):
        row = rows[name]
        assert list(row["collectives"]) == ["all-reduce"]
        assert row["wire_bytes"] < 24 * row["leaves"]
        assert row["reused_bytes"] == row["gradient_bytes"]
        assert row["products"] is None
    assert rows["optax.contrib.muon(0.02)"]["collectives"]["all-gather"] > 10
    # By itself XLA sends more to split the products, or computes some twice.
    ours, theirs = (rows[x] for x in ("orthogonalize()", "optax.contrib.scale_by_muon(beta=0)"))
    assert ours["wire_ratio"] < 0.5 * theirs["wire_ratio"]
    assert 1 <= ours["products"] < 3
    assert theirs["products"] >= 1


@pytest.mark.skipif(INSTALLED, reason="the compilers are installed")
def test_without_the_compilers_each_topology_has_one_line_that_names_the_extra(tmp_path, capsys):
    assert main(["lower", "--out", str(tmp_path / "new")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": left out")[0] for line in lines] == list(TOPOLOGIES)
    assert all("pip install '.[bench,aot]'" in line for line in lines)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--topology", "abacus"], "argument --topology: invalid choice: 'abacus'"),
        (["--method", "magic"], "argument --method: invalid choice: 'magic'"),
    ],
)
def test_a_wrong_value_is_answered_by_one_line(options, answer, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["lower", *options])
    said = capsys.readouterr().err
    assert said.startswith(f"python -m benchmarks lower: {answer}")
    assert said.count("\n") == 1
