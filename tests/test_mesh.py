"""Sharded gradients give the update of unsharded ones, keep their layout, and send scalars only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import NORMS, exported_for, scaled
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    LAYER_SPECS,
    LAYERS,
    MAGNITUDES,
    ON_CPU,
    SCOPES,
    SPECS,
    check_layout,
    check_same,
    check_wire,
    draw,
    every_layer,
    gradients,
    make_mesh,
    shard,
    shard_map,
)

from optax_unitscale import gradient_norms

# The two kinds of axes differ in how JAX traces, which is the same for every norm and scope.
AUTO = [(AxisType.Auto, scope, norm) for scope in SCOPES for norm in NORMS]
EXPLICIT = [(AxisType.Explicit, *pair) for pair in zip([*SCOPES, "leaf"], NORMS, strict=True)]


@pytest.mark.parametrize(("kind", "scope", "norm"), AUTO + EXPLICIT)
def test_sharded_arrays_keep_layout_and_send_only_scalars(kind, scope, norm):
    with jax.set_mesh(mesh := make_mesh(kind)):
        inputs = [shard(gradients(magnitudes), mesh, SPECS) for magnitudes in MAGNITUDES]
        update = jax.jit(lambda tree: scaled(tree, norm, scope=scope)).lower(inputs[0]).compile()
        results = [update(tree) for tree in inputs]
    check_wire(update, most=ON_CPU)
    for magnitudes, tree, result in zip(MAGNITUDES, inputs, results, strict=True):
        check_layout(result, tree)
        check_same(result, scaled(gradients(magnitudes), norm, scope=scope))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", SCOPES, ids=["leaf", "global", "labels"])
@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_the_program_for_gpu_gives_the_same_update_and_sends_only_scalars(way, scope, norm):
    def update(tree):
        return scaled(tree, norm, scope=scope)

    mesh = make_mesh()
    split = jax.jit(update) if way == "jit" else shard_map(update, (SPECS,), SPECS)
    run = exported_for(split, shard(gradients({}), mesh, SPECS))
    check_wire(run.lower(shard(gradients({}), mesh, SPECS)).compile())
    for magnitudes in MAGNITUDES:
        result = run(shard(gradients(magnitudes), mesh, SPECS))
        check_same(result, scaled(gradients(magnitudes), norm, scope=scope))


@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("b", "a"), P(("a", "b"))])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_program_for_gpu_takes_columns_that_devices_share(kind, spec):
    gradient = {"x": draw((8, 12)).astype(jnp.bfloat16)}

    def update(tree):
        return scaled(tree, axis=0)

    with jax.set_mesh(mesh := make_mesh(kind)):
        tree = shard(gradient, mesh, {"x": spec})
        result = exported_for(update, tree)(tree)
    check_layout(result, tree)
    check_same(result, update(gradient))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("way", "bad"), [("jit", np.nan), ("shard_map", -np.inf), ("told", np.inf)]
)
def test_nan_or_inf_on_one_device_makes_the_group_nan_on_all(way, bad, norm):
    mesh, spec = make_mesh(), {"bad": P("a", "b"), "good": P("b", "a")}
    tree = {"bad": draw((8, 4)), "good": draw((8, 4), seed=1)}
    tree["bad"][5, 1] = bad

    def update(tree):
        told = (lambda path, x: ("a", "b")) if way == "told" else None
        leaf, whole = (
            scaled(tree, norm, scope=scope, axis_name=told) for scope in ("leaf", "global")
        )
        return leaf, whole, gradient_norms(tree, norm, axis_name=told)

    if way == "jit":
        leaf, whole, norms = jax.jit(update)(shard(tree, mesh, spec))
    else:
        specs = (spec, spec, dict.fromkeys(spec, P()))
        leaf, whole, norms = shard_map(update, (spec,), specs, check_vma=way != "told")(tree)
    np.testing.assert_equal(float(norms["bad"]), abs(bad))
    assert np.isnan(leaf["bad"]).all()
    check_same(leaf["good"], scaled(tree["good"], norm))
    assert all(np.isnan(x).all() for x in whole.values())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_calls_outside_jit_keep_the_layout_too(kind):
    with jax.set_mesh(mesh := make_mesh(kind)):
        tree = shard(gradients({}), mesh, SPECS)
        result = scaled(tree, "l2", scope="global")
        norms = gradient_norms(tree, scope="global")
    check_layout(result, tree)
    check_same(result, scaled(gradients({}), "l2", scope="global"))
    check_same(norms, gradient_norms(gradients({}), scope="global"))


def test_leaves_that_do_not_divide_evenly_give_the_same_update_without_gathering():
    leaf = draw((7, 5)) * np.float32(1e-25)
    split = NamedSharding(make_mesh(), P("a", "b"))

    def update(x):
        x = lax.with_sharding_constraint(x, split)
        return {norm: scaled(x, norm) for norm in NORMS}

    # Only norms: JAX has no output that is split unevenly, and would gather one.
    def measure(x):
        return gradient_norms(lax.with_sharding_constraint(x, split))

    check_same(jax.jit(update)(leaf), {norm: scaled(leaf, norm) for norm in NORMS})
    norms = jax.jit(measure).lower(leaf).compile()
    check_wire(norms, most=ON_CPU)
    check_same(norms(leaf), gradient_norms(leaf))


@pytest.mark.parametrize("spec", LAYER_SPECS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_stacked_layers_are_scaled_each_by_itself_without_gathering(kind, spec):
    with jax.set_mesh(mesh := make_mesh(kind)):
        layers = shard(LAYERS, mesh, spec)
        update = jax.jit(every_layer).lower(layers).compile()
        result = update(layers)
    check_wire(update, most=len(LAYERS) * ON_CPU)
    check_layout(result, dict.fromkeys(NORMS, layers))
    check_same(result, every_layer(LAYERS))


def test_leaves_that_share_norms_but_not_how_these_are_split_are_refused():
    text = (
        r"updates\['b'\] is split over \(None,\) along the axes that it keeps, but updates\['a'\] "
    )
    text += r"of the same group over \('a',\).*use jax.sharding.reshard"
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


def test_a_leaf_with_reduced_axes_keeps_them_and_an_unreduced_one_is_refused():
    def multiply(x, y):
        return jnp.einsum("ij,jk->ik", x, y, out_sharding=P(None, None, unreduced=frozenset("a")))

    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        x = jax.device_put(jnp.ones((8, 4)), P(None, "b", reduced=frozenset("a")))
        assert abs(float(gradient_norms(x)["updates"]) - 32**0.5) < 1e-6
        for axis in (None, 0, (1,)):
            result = jax.jit(lambda x, axis=axis: scaled(x, axis=axis))(x)
            assert result.sharding == x.sharding
            check_same(result, scaled(np.ones((8, 4), np.float32), axis=axis))
        sides = jax.device_put(jnp.ones((8, 8)), P(None, "a")), jax.device_put(x, P("a"))
        unreduced = jax.jit(multiply)(*sides)
        for call in (scaled, gradient_norms):
            with pytest.raises(
                ValueError, match=r"is unreduced over .*jax\.sharding\.reshard first"
            ):
                call(unreduced)
