"""What is compared: unit_scale, the naive division and Optax, and the memory's own ceilings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing.trees import block_labels
from optax_unitscale import unit_scale

# How often each ceiling moves the bytes of the gradient between memory and processor.
PASSES = {"read": 1, "copy": 2, "triad": 3}


class Method(NamedTuple):
    """A way to change the gradient.

    `passes` are the ceilings that together move the bytes it has to move: one read for a norm, and
    a copy (a read and a write) for the division, though a leaf that stays in a cache comes from
    memory only once. `needs_params` says whether it looks at the parameters.
    """

    change: optax.GradientTransformation
    passes: tuple[str, ...] = ("read", "copy")
    needs_params: bool = False


def stacked_axes(path: str, x: jax.Array) -> tuple[int, ...]:
    """The axes of a norm where blocks are stacked along axis 0: theirs but that one."""
    return tuple(range(1 if path.startswith("blocks") else 0, x.ndim))


def _squares(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    # In bfloat16 the naive sum would stop growing at 256 equal squares.
    wide = x.astype(jnp.float32)
    return jnp.sum(wide * wide, axis=axes, keepdims=axes is not None)


def _divided(x: jax.Array, square: Any) -> jax.Array:
    return (x.astype(jnp.float32) * jax.lax.rsqrt(square)).astype(x.dtype)


@optax.stateless
def _naive_leaf(updates: Any, _: Any) -> Any:
    return jax.tree.map(lambda x: _divided(x, _squares(x)), updates)


@optax.stateless
def _naive_global(updates: Any, _: Any) -> Any:
    square = sum(_squares(x) for x in jax.tree.leaves(updates))
    return jax.tree.map(lambda x: _divided(x, square), updates)


@optax.stateless
def _naive_axis(updates: Any, _: Any) -> Any:
    def divide(path: Any, x: jax.Array) -> jax.Array:
        axes = stacked_axes(jax.tree_util.keystr(path, simple=True, separator="/"), x)
        return _divided(x, _squares(x, axes))

    return jax.tree_util.tree_map_with_path(divide, updates)


@optax.stateless
def _naive_labels(updates: Any, _: Any) -> Any:
    labels = block_labels(updates)
    sums: dict[str, Any] = {}
    for label, x in zip(jax.tree.leaves(labels), jax.tree.leaves(updates), strict=True):
        sums[label] = sums.get(label, 0) + _squares(x)
    return jax.tree.map(lambda x, label: _divided(x, sums[label]), updates, labels)


_TWO_READS = ("read", "read", "copy")
# The first of each is what the others are compared with.
SCOPES: dict[str, dict[str, Method]] = {
    "leaf": {
        "x * rsqrt(sum(x * x))": Method(_naive_leaf),
        "unit_scale()": Method(unit_scale()),
        "optax.clip_by_block_rms(1)": Method(optax.clip_by_block_rms(1.0)),
        "optax.scale_by_trust_ratio()": Method(optax.scale_by_trust_ratio(), _TWO_READS, True),
        "optax.adaptive_grad_clip(0.01)": Method(optax.adaptive_grad_clip(0.01), _TWO_READS, True),
    },
    "global": {
        "x * rsqrt(sum of all x * x)": Method(_naive_global),
        'unit_scale(scope="global")': Method(unit_scale(scope="global")),
        "optax.normalize_by_update_norm()": Method(optax.normalize_by_update_norm()),
        # After those above it always clips; at 1e9 it never does, and XLA then writes nothing.
        "optax.clip_by_global_norm(0.5)": Method(optax.clip_by_global_norm(0.5)),
        "optax.clip_by_global_norm(1e9)": Method(optax.clip_by_global_norm(1e9), ("read",)),
    },
    "axis": {
        "x * rsqrt(sum(x * x, axes))": Method(_naive_axis),
        "unit_scale(axis=...)": Method(unit_scale(axis=stacked_axes)),
    },
    "labels": {
        "x * rsqrt(sum of the block's x * x)": Method(_naive_labels),
        "unit_scale(scope=labels)": Method(unit_scale(scope=block_labels)),
    },
}

# `(updates, params) -> (updates, what else must be computed)`.
CEILINGS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "read": lambda updates, _: (updates, jax.tree.map(jnp.sum, updates)),
    # The sign, because 1.0001 is 1 in bfloat16, and XLA knows that there is nothing to do.
    "copy": lambda updates, _: (jax.tree.map(jnp.negative, updates), None),
    "triad": lambda updates, params: (
        jax.tree.map(lambda x, p: x * 0.5 + p, updates, params),
        None,
    ),
}

_NORM = ("read", "triad")
# Before plain gradient descent, in a chain.
STEPS = {
    "sgd": Method(optax.identity(), ("triad",)),
    "unit_scale(), sgd": Method(unit_scale(), _NORM),
    'unit_scale(scope="global"), sgd': Method(unit_scale(scope="global"), _NORM),
    "optax.clip_by_block_rms(1), sgd": Method(optax.clip_by_block_rms(1.0), _NORM),
    "optax.normalize_by_update_norm(), sgd": Method(optax.normalize_by_update_norm(), _NORM),
    "optax.clip_by_global_norm(0.5), sgd": Method(optax.clip_by_global_norm(0.5), _NORM),
}
