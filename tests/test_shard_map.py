"""Inside `jax.shard_map` and `jax.pmap` a norm runs over the devices that a leaf is split over."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from common import NORMS, scaled
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import (
    LABELS,
    LAYER_SPECS,
    LAYERS,
    MAGNITUDES,
    SPECS,
    check_same,
    draw,
    every_layer,
    gradients,
    make_mesh,
    names_of,
    shard,
    shard_map,
)

from optax_unitscale import gradient_norms


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("scope", "check_vma"),
    [("leaf", True), ("global", True), (LABELS, True), ("global", False)],
    ids=["leaf", "global", "labels", "global-told"],
)
def test_shard_map_sums_split_leaves_and_only_those(scope, check_vma, norm):
    told = None if check_vma else lambda path, x: names_of(SPECS[path])

    def update(tree):
        return (
            scaled(tree, norm, scope=scope, axis_name=told),
            gradient_norms(tree, norm, scope=scope, axis_name=told),
        )

    update = shard_map(update, (SPECS,), (SPECS, P()), check_vma=check_vma)
    for magnitudes in MAGNITUDES:
        tree = gradients(magnitudes)
        result, norms = update(tree)
        check_same(result, scaled(tree, norm, scope=scope))
        check_same(norms, gradient_norms(tree, norm, scope=scope))


def test_a_gathered_leaf_has_unit_norm_with_either_of_the_two_cures():
    x = jnp.asarray(draw((8, 3)))

    def norm_with(gathering=(), out_specs=None, **options):
        def update(part):
            whole = lax.all_gather(part, "a", tiled=True, **dict(gathering))
            return scaled(whole, **options)

        return float(jnp.linalg.norm(shard_map(update, P("a"), out_specs or P("a"))(x)[:8]))

    # The symptom: each of the four devices counts the whole.
    assert abs(norm_with() - 0.5) < 1e-6
    assert abs(norm_with(axis_name=()) - 1) < 1e-6
    if "to" in inspect.signature(lax.all_gather).parameters:
        assert abs(norm_with({"to": "invarying"}, P()) - 1) < 1e-6


def test_axes_left_to_the_compiler_inside_shard_map_are_summed_too():
    tree = {name: gradients({})[name] for name in ("columns", "block", "turned")}
    inputs = shard(tree, make_mesh(), {name: SPECS[name] for name in tree})
    manual = {"columns": P(None, "a"), "block": P("a"), "turned": P(None, "a")}

    def update(tree):
        return {norm: scaled(tree, norm, scope="global") for norm in NORMS}

    result = shard_map(update, (manual,), dict.fromkeys(NORMS, manual), axis_names={"a"})(inputs)
    check_same(result, {norm: scaled(tree, norm, scope="global") for norm in NORMS})


@pytest.mark.parametrize(("spec", "axis_name"), [(P("a"), "a"), (P("b", "a"), ("a", "b"))])
def test_one_axis_name_or_a_tuple_holds_for_all_leaves(spec, axis_name):
    tree = {"x": draw((8, 4)), "y": draw((4, 8), seed=1)}

    def update(tree):
        return {norm: scaled(tree, norm, axis_name=axis_name) for norm in NORMS}

    result = shard_map(update, spec, spec, check_vma=False)(tree)
    check_same(result, {norm: scaled(tree, norm) for norm in NORMS})


def test_pmap_sums_over_the_named_axis_what_is_split_over_it():
    tree = {"split": draw((8, 3, 2)), "whole": draw((5,), seed=1)}

    def update(tree, **options):
        return {norm: scaled(tree, norm, scope="global", **options) for norm in NORMS}

    result = jax.pmap(
        lambda tree: update(tree, axis_name=lambda path, x: "i" if path == "split" else ()),
        "i",
        in_axes=({"split": 0, "whole": None},),
        out_axes={norm: {"split": 0, "whole": None} for norm in NORMS},
        devices=jax.devices("cpu"),
    )(tree)
    check_same(result, update(tree))


def test_told_nothing_a_device_in_pmap_scales_its_own_part():
    result = jax.pmap(lambda x: scaled(x, "l2"), "i", devices=jax.devices("cpu"))(draw((8, 6)))
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, rtol=4 * 2.0**-23)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", LAYER_SPECS)
def test_stacked_layers_in_shard_map_are_summed_over_the_axes_given(spec, check_vma):
    within = names_of(spec[1:])
    result = shard_map(lambda x: every_layer(x, axis_name=within), spec, spec, check_vma=check_vma)(
        LAYERS
    )
    check_same(result, every_layer(LAYERS))


EXPERT_TREE = {
    "experts": draw((4, 3, 6)),
    "attention": draw((8, 5), seed=1),
    "router": draw((6, 4), seed=2),
}
EXPERT_SPECS = {"experts": P("a", None, "b"), "attention": P(("a", "b")), "router": P()}


@pytest.mark.parametrize("norm", NORMS)
def test_a_global_norm_over_expert_split_and_whole_leaves_counts_every_element_once(norm):
    def measure(tree):
        return gradient_norms(tree, norm, scope="global"), scaled(tree, norm, scope="global")

    norms, result = shard_map(measure, (EXPERT_SPECS,), (P(), EXPERT_SPECS))(EXPERT_TREE)
    exact = float(oracle.norm_of(list(EXPERT_TREE.values()), norm))
    np.testing.assert_allclose(float(norms["global"]), exact, rtol=4 * 2.0**-23)
    parts = [np.asarray(x) for x in jax.tree.leaves(result)]
    np.testing.assert_allclose(float(oracle.norm_of(parts, norm)), 1, rtol=4 * 2.0**-23)


@pytest.mark.parametrize("check_vma", [True, False])
def test_an_expert_with_its_own_norm_may_be_weak_on_its_devices_alone(check_vma):
    # They alone take its squares again, while all devices add up the attention's.
    weak = np.array([1, 1, 1e-25, 1], np.float32).reshape(4, 1, 1)
    tree = EXPERT_TREE | {"experts": EXPERT_TREE["experts"] * weak}
    options = {"axis": lambda path, x: (1, 2) if path == "experts" else None}
    names = {"experts": "b", "attention": ("a", "b"), "router": ()}

    def update(tree, **told):
        more = options | told
        return [(scaled(tree, n, **more), gradient_norms(tree, n, **more)) for n in ("l2", "rms")]

    norms = {"experts": P("a"), "attention": P(), "router": P()}
    result = shard_map(
        lambda tree: update(tree, axis_name=lambda path, x: names[path]),
        (EXPERT_SPECS,),
        [(EXPERT_SPECS, norms)] * 2,
        check_vma=check_vma,
    )(tree)
    check_same(result, update(tree))


FLOAT32 = {name: SPECS[name] for name in ("columns", "block", "whole")}


def loss(tree, weights, norm, told=None, specs=None):
    """A function of two updates; with `specs`, of those of all devices."""
    total = jnp.zeros(())
    for scope in ("leaf", "global"):
        update = scaled(tree, norm, scope=scope, axis_name=told)
        for name in tree:
            part = jnp.sum(weights[name] * jnp.sin(3 * update[name]))
            split = names_of(specs[name]) if specs else ()
            total += lax.psum(part, split) if split else part
    return total


derivative = jax.jit(jax.grad(loss), static_argnums=2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("way", ["inside shard_map", "of shard_map, told"])
def test_the_derivative_through_a_sharded_update_is_that_of_the_single_device(way, norm):
    tree = {name: gradients({})[name] for name in FLOAT32}
    weights = {name: draw(x.shape, seed=9) for name, x in tree.items()}
    mesh = make_mesh()
    inputs = shard(tree, mesh, FLOAT32), shard(weights, mesh, FLOAT32)
    if way == "inside shard_map":

        def inside(tree, weights):
            return jax.grad(loss)(tree, weights, norm, specs=FLOAT32)

        result = shard_map(inside, (FLOAT32, FLOAT32), FLOAT32)(*inputs)
    else:

        def local(tree, weights):
            return loss(tree, weights, norm, lambda path, x: names_of(FLOAT32[path]), FLOAT32)

        whole = shard_map(local, (FLOAT32, FLOAT32), P(), check_vma=False)
        result = jax.jit(jax.grad(whole))(*inputs)
    for name, expected in derivative(tree, weights, norm).items():
        # A sum of terms of either sign: the error is that of the largest.
        atol = 1e-5 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(result[name], expected, rtol=0, atol=atol)
