"""Sharded gradients give the update of unsharded ones, keep their layout, and send scalars only."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from common import NORMS, exported_for, scaled
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_unitscale import gradient_norms

LEAVES = {
    "columns": ((5, 8), P(None, "a"), "float32"),
    # Each device's part is more than what counts as small.
    "block": ((160, 120), P("a", "b"), "float32"),
    "turned": ((120, 160), P("b", "a"), "bfloat16"),
    "fine": ((16, 3), P(("b", "a")), "float16"),
    "whole": ((7,), P(), "float32"),
}
SPECS = {name: spec for name, (_, spec, _) in LEAVES.items()}
LABELS = {name: "first" if name in ("columns", "turned", "whole") else "second" for name in LEAVES}
SCOPES = ["leaf", "global", LABELS]
ALIKE = [dict.fromkeys(LEAVES, magnitude) for magnitude in (1.0, 1e-25, 1e25)]
MAGNITUDES = [*ALIKE, {"columns": 1e-25, "block": 1e-30, "turned": 1e25}]
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2, devices=jax.devices("cpu"))


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradients(magnitudes):
    """One array for each of LEAVES; float16 ones stay at 1."""
    tree = {}
    for seed, (name, (shape, _, dtype)) in enumerate(LEAVES.items()):
        magnitude = 1.0 if dtype == "float16" else magnitudes.get(name, 1.0)
        tree[name] = (draw(shape, seed) * np.float32(magnitude)).astype(jnp.dtype(dtype))
    return tree


def shard(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def names_of(spec):
    """The mesh axes over which a leaf of this spec is split."""
    return tuple(a for part in spec if part for a in (part if isinstance(part, tuple) else (part,)))


def shard_map(function, in_specs, out_specs, **options):
    mesh = make_mesh()
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)
    )


def check_same(sharded, single):
    """Equal but for the order of a sum, its root, a quotient, and the rounding to the dtype.

    XLA adds elements up in windows of 32, and the sum is then off by up to 6 units:
    6 for the roots of the two sums, 2 for the two quotients and roundings.
    """
    assert jax.tree.structure(sharded) == jax.tree.structure(single)
    for x, y in zip(jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
        assert x.dtype == y.dtype
        info = jnp.finfo(y.dtype)
        np.testing.assert_allclose(
            np.asarray(x, np.float64),
            np.asarray(y, np.float64),
            rtol=8 * float(info.eps),
            atol=float(info.tiny),
        )


# Before JAX 0.10.2 CPU adds up one axis of a leaf after the other.
ON_CPU = 1 if jax.__version_info__ >= (0, 10, 2) else 160


def check_wire(compiled, most=1):
    """All that devices send each other are all-reduces of `most` elements."""
    collectives = COLLECTIVE.findall(compiled.as_text())
    assert collectives
    for shapes, kind in collectives:
        assert kind == "all-reduce"
        for sizes in re.findall(r"\w+\[([\d,]*)\]", shapes):
            assert math.prod(int(n) for n in sizes.split(",") if n) <= most


def check_layout(results, inputs):
    for y, x in zip(jax.tree.leaves(results), jax.tree.leaves(inputs), strict=True):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)


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


# Layers of far magnitudes: a scale of one layer must not reach another, on whichever device it is.
LAYERS = draw((8, 48, 60)) * (10.0 ** np.arange(-32, 32, 8))[:, None, None].astype(np.float32)
LAYER_SPECS = [P("a"), P(("a", "b")), P("b", "a"), P(None, "a", "b"), P("a", None, "b")]


def every_layer(x, **options):
    return {norm: scaled(x, norm, axis=(1, 2), **options) for norm in NORMS}


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
