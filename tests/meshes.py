"""What the tests of sharding have in common: a mesh, split leaves, and what must hold of them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from common import scaled
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = [
    "CASES",
    "LAYERS",
    "LAYER_SPECS",
    "MAGNITUDES",
    "ON_CPU",
    "SPECS",
    "check_layers",
    "check_layout",
    "check_same",
    "check_wire",
    "draw",
    "every_case",
    "gradients",
    "make_mesh",
    "names_of",
    "on_one_device",
    "shard",
    "shard_map",
]

LEAVES = {
    "columns": ((5, 8), P(None, "a"), "float32"),
    # Each device's part is more than what counts as small.
    "block": ((160, 240), P("a", "b"), "float32"),
    "fine": ((16, 3), P(("b", "a")), "bfloat16"),
    "whole": ((7,), P(), "float32"),
}
SPECS = {name: spec for name, (_, spec, _) in LEAVES.items()}
LABELS = {"columns": "first", "block": "second", "fine": "second", "whole": "first"}
# Norms in scopes of their own, to be compiled together.
CASES = {"l2": "leaf", "rms": "global", "linf": LABELS}
ALIKE = [dict.fromkeys(LEAVES, magnitude) for magnitude in (1.0, 1e-25, 1e25)]
MAGNITUDES = [*ALIKE, {"columns": 1e-25, "block": 1e-30, "fine": 1e25}]
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)


def every_case(tree, **options):
    return {norm: scaled(tree, norm, scope=scope, **options) for norm, scope in CASES.items()}


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2, devices=jax.devices("cpu"))


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradients(magnitudes):
    """One array for each of LEAVES."""
    return {
        name: (draw(shape, seed) * np.float32(magnitudes.get(name, 1.0))).astype(jnp.dtype(dtype))
        for seed, (name, (shape, _, dtype)) in enumerate(LEAVES.items())
    }


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


@functools.cache
def on_one_device():
    """The updates of every case for each of MAGNITUDES."""
    update = jax.jit(every_case)
    return [update(gradients(magnitudes)) for magnitudes in MAGNITUDES]


# Layers of far magnitudes: a scale of one layer must not reach another, on whichever device it is.
LAYERS = draw((8, 48, 60)) * (10.0 ** np.arange(-32, 32, 8))[:, None, None].astype(np.float32)
LAYER_SPECS = [P(("a", "b")), P("b", "a"), P(None, "a", "b")]


def check_layers(result, norm):
    """Each layer, however split, as on one device."""
    check_same(result, [scaled(LAYERS, norm, axis=(1, 2))] * len(LAYER_SPECS))
