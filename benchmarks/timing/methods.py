"""What is compared: unit_scale, the naive division and Optax, and what memory allows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_unitscale import unit_scale


def _square(x: jax.Array) -> jax.Array:
    # In bfloat16 the naive sum would stop growing at 256 equal squares.
    wide = x.astype(jnp.float32)
    return jnp.sum(wide * wide)


def _divided(x: jax.Array, square: Any) -> jax.Array:
    return (x.astype(jnp.float32) * jax.lax.rsqrt(square)).astype(x.dtype)


@optax.stateless
def _naive_leaf(updates: Any, _: Any) -> Any:
    return jax.tree.map(lambda x: _divided(x, _square(x)), updates)


@optax.stateless
def _naive_global(updates: Any, _: Any) -> Any:
    square = sum(_square(x) for x in jax.tree.leaves(updates))
    return jax.tree.map(lambda x: _divided(x, square), updates)


# The first of each is what the others are compared with.
SCOPES: dict[str, dict[str, optax.GradientTransformation]] = {
    "leaf": {
        "x * rsqrt(sum(x * x))": _naive_leaf,
        "unit_scale()": unit_scale(),
        "optax.clip_by_block_rms(1)": optax.clip_by_block_rms(1.0),
    },
    "global": {
        "x * rsqrt(sum of all x * x)": _naive_global,
        'unit_scale(scope="global")': unit_scale(scope="global"),
        "optax.normalize_by_update_norm()": optax.normalize_by_update_norm(),
        # After those above it always clips; at 1e9 it never does, and XLA then writes nothing.
        "optax.clip_by_global_norm(0.5)": optax.clip_by_global_norm(0.5),
        "optax.clip_by_global_norm(1e9)": optax.clip_by_global_norm(1e9),
    },
}
# What memory allows: `(updates, None) -> (updates, what else is computed)`. A norm takes a read
# of the gradient, and the division a copy.
CEILINGS: dict[str, Callable[[Any, None], tuple[Any, Any]]] = {
    "read": lambda updates, _: (updates, jax.tree.map(jnp.sum, updates)),
    # The sign, because 1.0001 is 1 in bfloat16, and XLA knows that there is nothing to do.
    "copy": lambda updates, _: (jax.tree.map(jnp.negative, updates), None),
}
