"""What is compared: unit_scale, the naive division and Optax, and the memory's own ceilings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing.trees import block_labels
from optax_unitscale import unit_scale

__all__ = ["CEILINGS", "PASSES", "SCOPES", "STEPS", "Method", "stacked_axes"]

# How often each ceiling moves the bytes of the gradient between memory and processor.
PASSES = {"read": 1, "copy": 2, "triad": 3}


class Method(NamedTuple):
    """A way to change the gradient.

    Attributes:
      function: `(updates, params) -> updates`.
      passes: the ceilings that together move the bytes it has to move: one read for a norm, and a
        copy (a read and a write) for the division, though a leaf that stays in a cache comes from
        memory only once.
      needs_params: whether it looks at the parameters.
    """

    function: Callable[[Any, Any], Any]
    passes: tuple[str, ...] = ("read", "copy")
    needs_params: bool = False


def stacked_axes(path: str, x: jax.Array) -> tuple[int, ...]:
    """The axes of a norm where blocks are stacked along axis 0: theirs but that one."""
    return tuple(range(1 if path.startswith("blocks") else 0, x.ndim))


def _optax(made: optax.GradientTransformation, *passes: str, needs_params: bool = False) -> Method:
    def update(updates: Any, params: Any) -> Any:
        return made.update(updates, made.init(updates), params)[0]

    return Method(update, passes or ("read", "copy"), needs_params)


def _squares(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    # In bfloat16 the naive sum would stop growing at 256 equal squares.
    wide = x.astype(jnp.float32)
    return jnp.sum(wide * wide, axis=axes, keepdims=axes is not None)


def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _naive_leaf(updates: Any, _: Any) -> Any:
    return jax.tree.map(lambda x: _times(x, jax.lax.rsqrt(_squares(x))), updates)


def _naive_global(updates: Any, _: Any) -> Any:
    scale = jax.lax.rsqrt(sum(_squares(x) for x in jax.tree.leaves(updates)))
    return jax.tree.map(lambda x: _times(x, scale), updates)


def _naive_axis(updates: Any, _: Any) -> Any:
    def divide(path: Any, x: jax.Array) -> jax.Array:
        axes = stacked_axes(jax.tree_util.keystr(path, simple=True, separator="/"), x)
        return _times(x, jax.lax.rsqrt(_squares(x, axes)))

    return jax.tree_util.tree_map_with_path(divide, updates)


def _naive_labels(updates: Any, _: Any) -> Any:
    labels = block_labels(updates)
    sums: dict[str, Any] = {}
    for label, x in zip(jax.tree.leaves(labels), jax.tree.leaves(updates), strict=True):
        sums[label] = sums.get(label, 0) + _squares(x)
    return jax.tree.map(lambda x, label: _times(x, jax.lax.rsqrt(sums[label])), updates, labels)


# The first of each is what the others are compared with.
SCOPES: dict[str, dict[str, Method]] = {
    "leaf": {
        "x * rsqrt(sum(x * x))": Method(_naive_leaf),
        "unit_scale()": _optax(unit_scale()),
        "optax.clip_by_block_rms(1)": _optax(optax.clip_by_block_rms(1.0)),
        "optax.scale_by_trust_ratio()": _optax(
            optax.scale_by_trust_ratio(), "read", "read", "copy", needs_params=True
        ),
        "optax.adaptive_grad_clip(0.01)": _optax(
            optax.adaptive_grad_clip(0.01), "read", "read", "copy", needs_params=True
        ),
    },
    "global": {
        "x * rsqrt(sum of all x * x)": Method(_naive_global),
        'unit_scale(scope="global")': _optax(unit_scale(scope="global")),
        "optax.normalize_by_update_norm()": _optax(optax.normalize_by_update_norm()),
        # After those above it always clips; at 1e9 it never does, and XLA then writes nothing.
        "optax.clip_by_global_norm(0.5)": _optax(optax.clip_by_global_norm(0.5)),
        "optax.clip_by_global_norm(1e9)": _optax(optax.clip_by_global_norm(1e9), "read"),
    },
    "axis": {
        "x * rsqrt(sum(x * x, axes))": Method(_naive_axis),
        "unit_scale(axis=...)": _optax(unit_scale(axis=stacked_axes)),
    },
    "labels": {
        "x * rsqrt(sum of the block's x * x)": Method(_naive_labels),
        "unit_scale(scope=labels)": _optax(unit_scale(scope=block_labels)),
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

# Before plain gradient descent, in a chain.
STEPS: dict[str, tuple[optax.GradientTransformation, tuple[str, ...]]] = {
    "sgd": (optax.identity(), ("triad",)),
    "unit_scale(), sgd": (unit_scale(), ("read", "triad")),
    'unit_scale(scope="global"), sgd': (unit_scale(scope="global"), ("read", "triad")),
    "optax.clip_by_block_rms(1), sgd": (optax.clip_by_block_rms(1.0), ("read", "triad")),
    "optax.normalize_by_update_norm(), sgd": (
        optax.normalize_by_update_norm(),
        ("read", "triad"),
    ),
    "optax.clip_by_global_norm(0.5), sgd": (optax.clip_by_global_norm(0.5), ("read", "triad")),
}
