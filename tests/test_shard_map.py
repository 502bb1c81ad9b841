"""Inside `jax.shard_map` and `jax.pmap` a norm runs over the devices that a leaf is split over."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import scaled
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import (
    CASES,
    LAYER_SPECS,
    LAYERS,
    MAGNITUDES,
    SPECS,
    check_layers,
    check_same,
    draw,
    every_case,
    gradients,
    make_mesh,
    names_of,
    on_one_device,
    shard,
    shard_map,
)

from optax_unitscale import gradient_norms


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_sums_split_leaves_and_only_those(check_vma):
    told = None if check_vma else lambda path, x: names_of(SPECS[path])
    update = shard_map(
        lambda tree: every_case(tree, axis_name=told),
        (SPECS,),
        dict.fromkeys(CASES, SPECS),
        check_vma=check_vma,
    )
    for magnitudes, expected in zip(MAGNITUDES, on_one_device(), strict=True):
        check_same(update(gradients(magnitudes)), expected)


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
    tree = {name: gradients({})[name] for name in ("columns", "block")}
    inputs = shard(tree, make_mesh(), {name: SPECS[name] for name in tree})
    manual = {"columns": P(None, "a"), "block": P("a")}

    def update(tree):
        return {norm: scaled(tree, norm, scope="global") for norm in ("l2", "linf")}

    specs = dict.fromkeys(("l2", "linf"), manual)
    check_same(shard_map(update, (manual,), specs, axis_names={"a"})(inputs), update(tree))


@pytest.mark.parametrize(("spec", "axis_name"), [(P("a"), "a"), (P("b", "a"), ("a", "b"))])
def test_one_axis_name_or_a_tuple_holds_for_all_leaves(spec, axis_name):
    tree = {"x": draw((8, 4)), "y": draw((4, 8), seed=1)}
    result = shard_map(lambda t: scaled(t, axis_name=axis_name), spec, spec, check_vma=False)(tree)
    check_same(result, scaled(tree))


def test_pmap_sums_over_the_named_axis_what_is_split_over_it():
    tree = {"split": draw((8, 3, 2)), "whole": draw((5,), seed=1)}
    axes = {"split": 0, "whole": None}

    def update(tree, **options):
        return {norm: scaled(tree, norm, scope="global", **options) for norm in ("l2", "linf")}

    result = jax.pmap(
        lambda tree: update(tree, axis_name=lambda path, x: "i" if path == "split" else ()),
        "i",
        in_axes=(axes,),
        out_axes=dict.fromkeys(("l2", "linf"), axes),
        devices=jax.devices("cpu"),
    )(tree)
    check_same(result, update(tree))


def test_told_nothing_a_device_in_pmap_scales_its_own_part():
    result = jax.pmap(scaled, "i", devices=jax.devices("cpu"))(draw((8, 6)))
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, rtol=4 * 2.0**-23)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_stacked_layers_in_shard_map_are_summed_over_the_axes_given(norm):
    def every_layer(layers):
        return [
            scaled(x, norm, axis=(1, 2), axis_name=names_of(spec[1:]))
            for x, spec in zip(layers, LAYER_SPECS, strict=True)
        ]

    update = shard_map(every_layer, (LAYER_SPECS,), LAYER_SPECS, check_vma=False)
    check_layers(update([LAYERS] * len(LAYER_SPECS)), norm)


def test_an_expert_with_its_own_norm_may_be_weak_on_its_devices_alone():
    weak = np.array([1, 1, 1e-25, 1], np.float32).reshape(4, 1, 1)
    tree = {"experts": draw((4, 3, 6)) * weak, "attention": draw((8, 5), 1), "router": draw((6, 4))}
    specs = {"experts": P("a", None, "b"), "attention": P(("a", "b")), "router": P()}
    names = {"experts": "b", "attention": ("a", "b"), "router": ()}

    def update(tree, axis_name=None):
        axis = {"experts": (1, 2), "attention": None, "router": None}
        return (
            scaled(tree, axis=axis, axis_name=axis_name),
            gradient_norms(tree, axis=axis, axis_name=axis_name),
        )

    norms = {"experts": P("a"), "attention": P(), "router": P()}
    told = shard_map(lambda t: update(t, lambda path, x: names[path]), (specs,), (specs, norms))
    check_same(told(tree), update(tree))


def loss(tree, weights, told=None, specs=None):
    """A number made of updates by a sum and by a maximum; with `specs`, of all devices."""
    total = jnp.zeros(())
    for norm, scope in (("l2", "global"), ("linf", "leaf")):
        update = scaled(tree, norm, scope=scope, axis_name=told)
        for name in tree:
            part = jnp.sum(weights[name] * jnp.sin(3 * update[name]))
            split = names_of(specs[name]) if specs else ()
            total += lax.psum(part, split) if split else part
    return total


def test_the_derivative_through_a_sharded_update_is_that_of_the_single_device():
    specs = {name: SPECS[name] for name in ("block", "whole")}
    tree = {name: gradients({})[name] for name in specs}
    weights = {name: draw(x.shape, seed=9) for name, x in tree.items()}
    mesh = make_mesh()
    inputs = shard(tree, mesh, specs), shard(weights, mesh, specs)

    def inside(tree, weights):
        return jax.grad(loss)(tree, weights, specs=specs)

    def local(tree, weights):
        return loss(tree, weights, lambda path, x: names_of(specs[path]), specs)

    expected = jax.jit(jax.grad(loss))(tree, weights)
    of_whole = jax.grad(shard_map(local, (specs, specs), P(), check_vma=False))
    for gradient in (shard_map(inside, (specs, specs), specs), jax.jit(of_whole)):
        for name, result in gradient(*inputs).items():
            # A sum of terms of either sign: the error is that of the largest.
            atol = 1e-5 * float(jnp.abs(expected[name]).max())
            np.testing.assert_allclose(result, expected[name], rtol=0, atol=atol)
