"""Sharded gradients give the update of unsharded ones, keep their layout, and send scalars only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import exported_for, scaled
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    CASES,
    LAYER_SPECS,
    LAYERS,
    MAGNITUDES,
    ON_CPU,
    SPECS,
    check_layers,
    check_layout,
    check_same,
    check_wire,
    draw,
    every_case,
    gradients,
    make_mesh,
    on_one_device,
    shard,
    shard_map,
)

from optax_unitscale import gradient_norms

each_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


@each_kind
def test_sharded_arrays_keep_layout_and_send_only_scalars(kind):
    with jax.set_mesh(mesh := make_mesh(kind)):
        inputs = [shard(gradients(magnitudes), mesh, SPECS) for magnitudes in MAGNITUDES]
        update = jax.jit(every_case).lower(inputs[0]).compile()
        results = [update(tree) for tree in inputs]
    check_wire(update, most=ON_CPU)
    for tree, result, expected in zip(inputs, results, on_one_device(), strict=True):
        check_layout(result, dict.fromkeys(CASES, tree))
        check_same(result, expected)


@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_the_program_for_gpu_gives_the_same_update_and_sends_only_scalars(way):
    mesh = make_mesh()
    inputs = [shard(gradients(magnitudes), mesh, SPECS) for magnitudes in MAGNITUDES]
    in_parts = shard_map(every_case, (SPECS,), dict.fromkeys(CASES, SPECS))
    run = exported_for(jax.jit(every_case) if way == "jit" else in_parts, inputs[0])
    update = run.lower(inputs[0]).compile()
    check_wire(update)
    for tree, expected in zip(inputs, on_one_device(), strict=True):
        check_same(update(tree), expected)


@each_kind
def test_the_program_for_gpu_takes_columns_that_devices_share(kind):
    specs = {"a": P("a"), "b": P(None, "b"), "c": P("b", "a"), "d": P(("a", "b"))}
    tree = dict.fromkeys(specs, draw((8, 12)).astype(jnp.bfloat16))
    with jax.set_mesh(mesh := make_mesh(kind)):
        split = shard(tree, mesh, specs)
        result = exported_for(lambda tree: scaled(tree, axis=0), split)(split)
    check_layout(result, split)
    check_same(result, dict.fromkeys(specs, scaled(tree["a"], axis=0)))


# A sum keeps a NaN by itself, a maximum may not.
@pytest.mark.parametrize(
    ("way", "bad"), [("jit", np.nan), ("shard_map", -np.inf), ("told", np.inf)]
)
def test_nan_or_inf_on_one_device_makes_the_group_nan_on_all(way, bad):
    spec = {"bad": P("a", "b"), "good": P("b", "a")}
    tree = {"bad": draw((8, 4)), "good": draw((8, 4), seed=1)}
    tree["bad"][5, 1] = bad
    told = (lambda path, x: ("a", "b")) if way == "told" else None

    def update(tree):
        leaf, whole = (
            scaled(tree, "linf", scope=scope, axis_name=told) for scope in ("leaf", "global")
        )
        return leaf, whole, gradient_norms(tree, "linf", axis_name=told)

    if way == "jit":
        leaf, whole, norms = jax.jit(update)(shard(tree, make_mesh(), spec))
    else:
        mapped = shard_map(update, (spec,), (spec, spec, P()), check_vma=way != "told")
        leaf, whole, norms = mapped(tree)
    np.testing.assert_equal(float(norms["bad"]), abs(bad))
    assert np.isnan(leaf["bad"]).all()
    check_same(leaf["good"], scaled(tree["good"], "linf"))
    assert all(np.isnan(x).all() for x in whole.values())


@each_kind
def test_calls_outside_jit_keep_the_layout_too(kind):
    with jax.set_mesh(mesh := make_mesh(kind)):
        tree = shard(gradients({}), mesh, SPECS)
        result = scaled(tree, "rms", scope="global")
    check_layout(result, tree)
    check_same(result, on_one_device()[0]["rms"])


def test_leaves_that_do_not_divide_evenly_give_the_same_update_without_gathering():
    leaf = draw((7, 5)) * np.float32(1e-25)
    split = NamedSharding(make_mesh(), P("a", "b"))

    def update(x):
        return scaled(lax.with_sharding_constraint(x, split))

    # Only norms: JAX has no output that is split unevenly, and would gather one.
    def measure(x):
        x = lax.with_sharding_constraint(x, split)
        return [gradient_norms(x, norm) for norm in ("l2", "linf")]

    check_same(jax.jit(update)(leaf), scaled(leaf))
    norms = jax.jit(measure).lower(leaf).compile()
    check_wire(norms, most=ON_CPU)
    check_same(norms(leaf), [gradient_norms(leaf, norm) for norm in ("l2", "linf")])


@each_kind
def test_stacked_layers_are_scaled_each_by_itself_without_gathering(kind):
    with jax.set_mesh(mesh := make_mesh(kind)):
        layers = shard([LAYERS] * len(LAYER_SPECS), mesh, LAYER_SPECS)
        update = jax.jit(lambda layers: scaled(layers, axis=(1, 2))).lower(layers).compile()
        result = update(layers)
    check_wire(update, most=len(LAYERS) * ON_CPU)
    check_layout(result, layers)
    check_layers(result, "l2")


def test_leaves_that_share_norms_but_not_how_these_are_split_are_refused():
    text = (
        r"updates\['b'\] is split over \(None,\) along the axes that it keeps, but updates\['a'\] "
        r"of the same group over \('a',\).*use jax.sharding.reshard"
    )
    with jax.set_mesh(mesh := make_mesh(AxisType.Explicit)):
        tree = {"a": draw((8, 16)), "b": draw((8, 24))}
        split = shard(tree, mesh, {"a": P("a"), "b": P(None, "a")})
        with pytest.raises(ValueError, match=text):
            scaled(split, scope="global", axis=1)
        alike = shard(tree, mesh, {"a": P("a"), "b": P("a", "b")})
        check_same(scaled(alike, scope="global", axis=1), scaled(tree, scope="global", axis=1))


def test_beside_a_leaf_on_a_mesh_one_may_be_on_none():
    tree = {"a": draw((8, 16)), "b": draw((8, 24))}
    split = jax.device_put(tree["a"], NamedSharding(make_mesh(AxisType.Explicit), P("a")))
    expected = scaled(tree, scope="global", axis=1)
    for other in (tree["b"], jnp.asarray(tree["b"])):
        check_same(scaled({"a": split, "b": other}, scope="global", axis=1), expected)


def test_a_leaf_with_reduced_axes_keeps_them():
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        x = jax.device_put(jnp.asarray(draw((8, 4))), P(None, "b", reduced=frozenset("a")))
        result = jax.jit(lambda x: [scaled(x), scaled(x, axis=0)])(x)
        norm = gradient_norms(x)["updates"]
    assert all(y.sharding == x.sharding for y in result)
    check_same(result, [scaled(draw((8, 4))), scaled(draw((8, 4)), axis=0)])
    np.testing.assert_allclose(float(norm), np.linalg.norm(draw((8, 4))), rtol=1e-6)


def test_an_unreduced_leaf_is_refused():
    def multiply(x, y):
        return jnp.einsum("ij,jk->ik", x, y, out_sharding=P(None, None, unreduced=frozenset("a")))

    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        sides = jax.device_put(jnp.ones((8, 8)), P(None, "a")), jax.device_put(jnp.ones(8), P("a"))
        unreduced = jax.jit(multiply)(sides[0], sides[1][:, None])
        for call in (scaled, gradient_norms):
            text = rf"{call.__name__.replace('scaled', 'unit_scale')}: updates is unreduced over .*"
            with pytest.raises(ValueError, match=text + r"Use jax\.sharding\.reshard first"):
                call(unreduced)
