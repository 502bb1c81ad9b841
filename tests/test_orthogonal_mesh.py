"""`orthogonalize` across devices: the numbers of one, what is sent, what is computed, layouts."""

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import EMPTY, compilations, sample
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import check_layout, make_mesh, shard

from benchmarks.lowering.programs import (
    all_product_flops,
    collectives,
    product_flops,
    wire_bytes,
)
from optax_unitscale import Kernel, orthogonal
from optax_unitscale.orthogonal import orthogonalize

KINDS = [AxisType.Auto, AxisType.Explicit]
WIDTH = 16


def fsdp(kind: AxisType) -> Any:
    return jax.make_mesh((8,), ("fsdp",), axis_types=(kind,), devices=jax.devices("cpu"))


def blocks(depth: int) -> dict[str, Any]:
    shapes = {"query": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
    shapes |= {"up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}
    return {
        f"block_{i}": {
            name: {"kernel": sample(shape, np.float32, seed=10 * i + j)}
            for j, (name, shape) in enumerate(shapes.items())
        }
        for i in range(depth)
    }


def update(tree: Any, layers: Any = None, **options: Any) -> Any:
    return orthogonalize(layers=layers, **options).update(tree, EMPTY)[0]


def compiled(tree: Any, mesh: Any, is_set: bool = True, layers: Any = None) -> Any:
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        return jax.jit(lambda tree: update(tree, layers)).lower(tree).compile()


def sent(program: Any, tree: Any) -> tuple[set[str], float]:
    """The kinds of collectives, and what a device receives over what it holds."""
    found = collectives(program.as_text(), 8)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    return {x.kind for x in found}, sum(map(wire_bytes, found)) / held


def check_same(results: Any, tree: Any, layers: Any = None, atol: float = 1e-6) -> None:
    check_layout(results, tree)
    single = jax.jit(lambda tree: update(tree, layers))(jax.tree.map(np.asarray, tree))
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [8, 12])
def test_with_fsdp_matrices_go_and_come_once_and_no_product_is_computed_twice(kind, depth):
    arrays, mesh = blocks(depth), fsdp(kind)
    tree = shard(arrays, mesh, jax.tree.map(lambda _: P("fsdp"), arrays))
    program = compiled(tree, mesh)
    check_same(program(tree), tree)
    kinds, ratio = sent(program, tree)
    assert kinds == {"all-to-all"}
    assert ratio <= 2.2
    assert share_of_products(program, tree) == 1
    text = program.as_text()
    # Whole matrices, of each shape two a block. A device has an eighth of them.
    assert set(re.findall(r"= f32\[(\d+,\d+)\]\S* dot\(", text)) == {"16,16", "16,32"}
    trips = {int(n) for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', text)}
    assert trips == {2 * depth // 8, 5}


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_several_mesh_axes_are_kept_and_numbers_are_those_of_one_device(kind):
    arrays, mesh = blocks(9), make_mesh(kind)
    specs = {"query": P("a", "b"), "out": P("b", "a"), "up": P(("a", "b")), "down": P("b", "a")}
    layouts = {
        block: {name: {"kernel": specs[name]} for name in kernels}
        for block, kernels in arrays.items()
    }
    # Others of the same shape and name, and some that no device has to give.
    layouts["block_7"]["query"]["kernel"] = P("b")
    layouts["block_8"] = jax.tree.map(lambda _: P(), arrays["block_8"])
    tree = shard(arrays, mesh, layouts)
    check_same(compiled(tree, mesh)(tree), tree)


def test_explicit_shardings_need_no_mesh_that_is_set_and_automatic_ones_are_right_without():
    arrays = blocks(1)
    for kind in KINDS:
        mesh = fsdp(kind)
        tree = shard(arrays, mesh, jax.tree.map(lambda _: P("fsdp"), arrays))
        results = jax.jit(update)(tree)
        if kind is AxisType.Explicit:
            check_same(results, tree)
        else:
            single = jax.jit(update)(arrays)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), results, single)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_devices_have_whole_are_not_sent(kind):
    mesh, layers = fsdp(kind), {"**": Kernel(1, 2)}
    arrays = {"up": sample((8, 6, 10), np.float32), "down": sample((16, 10, 6), np.float32)}
    tree = shard(arrays, mesh, dict.fromkeys(arrays, P("fsdp")))
    program = compiled(tree, mesh, layers=layers)
    check_same(program(tree), tree, layers)
    assert sent(program, tree) == (set(), 0)


def share_of_products(program: Any, tree: Any) -> float:
    """What a device computes, over an even share."""
    whole = jax.make_jaxpr(update)(jax.tree.map(np.asarray, tree))
    return 8 * product_flops(program.as_text()) / all_product_flops(whole.jaxpr)


@pytest.fixture
def all_are_large(monkeypatch):
    """For a matrix of 16 x 64 as long as it takes to share it eight times, as if it were huge."""
    monkeypatch.setattr(orthogonal, "FLOPS_A_BYTE", 4.5)
    jax.clear_caches()
    yield
    jax.clear_caches()


def large(count: int, specs: Any, mesh: Any) -> Any:
    """Kernels of 16 x 64, of which every second is 64 x 16."""
    shapes = [(16, 64), (64, 16)] * count
    arrays = {
        f"block_{i}": {("up", "down")[i % 2]: {"kernel": sample(shapes[i], np.float32, seed=i)}}
        for i in range(count)
    }
    layouts = {
        f"block_{i}": {("up", "down")[i % 2]: {"kernel": specs[i % 2]}} for i in range(count)
    }
    return shard(arrays, mesh, layouts)


# Along "b" two devices share each matrix, or along both axes eight.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("count", "others", "is_even"), [(4, 2, True), (3, 2, False), (1, 8, True)]
)
def test_large_matrices_that_are_too_few_are_shared(kind, count, others, is_even, all_are_large):
    mesh = make_mesh(kind)
    tree = large(count, [P("a", "b"), P("b", "a")], mesh)
    program = compiled(tree, mesh)
    check_same(program(tree), tree, atol=3e-6)
    assert share_of_products(program, tree) == (1 if is_even else 4 / 3)
    found = collectives(program.as_text(), 8)
    # In each step the sum of A, its rows and those of the polynomial, for one matrix on a device.
    steps = 5 * 3 * 4 * 16 * 16 * (others - 1) / others
    held = 4 * 16 * 64 * count / 8
    assert sum(map(wire_bytes, found)) - steps <= 2.2 * 2 * held * (1 if is_even else 4 / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_over_is_shared_by_all_devices(kind, all_are_large):
    mesh = fsdp(kind)
    tree = large(9, [P("fsdp"), P(None, "fsdp")], mesh)
    program = compiled(tree, mesh)
    check_same(program(tree), tree, atol=3e-6)
    assert share_of_products(program, tree) == 1


@pytest.mark.parametrize("coefficients", ["muon", "aol"])
def test_shared_matrices_are_right_at_any_magnitude_and_nan_stays_alone(
    coefficients, all_are_large
):
    mesh = make_mesh()
    arrays = (
        sample((4, 16, 64), np.float32) * np.array([1e-30, 1, 1e30, 0], np.float32)[:, None, None]
    )
    broken = arrays.copy()
    broken[1, 3, 5] = np.nan

    @jax.jit
    def work(x: jax.Array) -> jax.Array:
        return update({"x": x}, {"x": Kernel(1, 2)}, coefficients=coefficients)["x"]

    wanted = np.asarray(work(arrays))
    with jax.set_mesh(mesh):
        x = shard(broken, mesh, P(None, "a", "b"))
        program = work.lower(x).compile()
    assert "f32[16,32]" in (program.as_text() or "")
    result = np.asarray(program(x))
    assert np.isnan(result[1]).all()
    np.testing.assert_allclose(result[[0, 2, 3]], wanted[[0, 2, 3]], atol=3e-6)


def test_rows_or_columns_that_devices_cannot_share_evenly_stay_whole(all_are_large):
    mesh = make_mesh()
    tree = shard({"kernel": sample((8, 27), np.float32)}, mesh, {"kernel": P("a")})
    program = compiled(tree, mesh)
    check_same(program(tree), tree)
    assert sent(program, tree)[0] == {"all-gather"}


def test_one_kernel_alone_is_worked_on_whole():
    mesh = fsdp(AxisType.Auto)
    tree = shard({"kernel": sample((8, 24), np.float32)}, mesh, {"kernel": P(None, "fsdp")})
    program = compiled(tree, mesh)
    check_same(program(tree), tree)
    assert sent(program, tree)[0] == {"all-gather"}


def test_a_second_call_under_a_mesh_compiles_nothing():
    mesh = fsdp(AxisType.Auto)
    tree = shard({"kernel": sample((8, 16), np.float32)}, mesh, {"kernel": P("fsdp")})
    step = jax.jit(update)
    with jax.set_mesh(mesh):
        step(tree)
        before = compilations()
        step(jax.tree.map(lambda x: x, tree))
    assert compilations() == before


def test_in_shard_map_a_part_of_a_matrix_is_refused_and_whole_ones_work():
    mesh = make_mesh()
    x, layers = sample((8, 4, 6), np.float32), {"x": Kernel(1, 2)}
    wanted = np.asarray(update({"x": x}, layers)["x"])

    def inside(x: jax.Array) -> jax.Array:
        return update({"x": x}, layers)["x"]

    def mapped(spec: Any, **options: Any) -> Any:
        return jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec, **options))

    with pytest.raises(
        ValueError, match=r"updates\['x'\] of shape \(8, 1, 6\) varies over \('a',\)"
    ):
        mapped(P(None, "a"))(x)
    np.testing.assert_allclose(mapped(P())(x), wanted, atol=1e-6)
    np.testing.assert_allclose(mapped(P("a"), check_vma=False)(x), wanted, atol=1e-6)


def test_where_some_mesh_axes_are_shard_maps_the_others_are_used():
    mesh = make_mesh()
    arrays = {str(i): {"kernel": sample((8, 16), np.float32, seed=i)} for i in range(2)}
    tree = shard(arrays, mesh, jax.tree.map(lambda _: P(None, "b"), arrays))
    split = jax.shard_map(update, mesh=mesh, in_specs=(P(),), out_specs=P(), axis_names={"a"})
    program = jax.jit(split).lower(tree).compile()
    check_same(program(tree), tree)
    assert sent(program, tree)[0] == {"all-to-all"}


def test_shard_map_may_take_some_axes_of_an_explicit_mesh():
    kernel = sample((8, 16), np.float32)
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        split = jax.shard_map(update, in_specs=(P(),), out_specs=P(), axis_names={"a"})
        result = jax.jit(split)({"kernel": kernel})
    np.testing.assert_allclose(result["kernel"], update({"kernel": kernel})["kernel"], atol=1e-6)


def test_kernels_on_a_mesh_and_off_it_may_have_one_shape():
    kernels = [sample((16, 8), np.float32, seed=seed) for seed in (0, 1)]
    mesh = fsdp(AxisType.Explicit)
    tree = [{"kernel": x} for x in (*shard(kernels[:1], mesh, [P("fsdp")]), kernels[1])]
    results = jax.jit(update)(tree)
    check_layout(results[0], tree[0])
    for result, kernel in zip(results, kernels, strict=True):
        wanted = update({"kernel": kernel})["kernel"]
        np.testing.assert_allclose(result["kernel"], wanted, atol=1e-6)


def test_types_with_reduced_axes_keep_them_and_unreduced_ones_are_refused():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(
            jnp.asarray(sample((8, 4), np.float32)), P(None, "b", reduced=frozenset({"a"}))
        )
        (result,) = jax.tree.leaves(jax.jit(update)({"kernel": x}))
        assert jax.typeof(result).sharding == jax.typeof(x).sharding
        sides = (
            jax.device_put(jnp.ones((8, 4)), P(None, "a")),
            jax.device_put(jnp.ones((4, 8)), P("a")),
        )
        part = jax.jit(
            lambda x, y: jnp.einsum("ij,jk->ik", x, y, out_sharding=P(unreduced=frozenset({"a"})))
        )
        with pytest.raises(ValueError, match=r"is unreduced over .*reshard first"):
            update({"kernel": part(*sides)})
