"""What is compared: unit_scale, the naive division and Optax, and what memory allows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_unitscale import unit_scale


class Method(NamedTuple):
    """A way to change the gradient, and whether it looks at the parameters."""

    change: optax.GradientTransformation
    needs_params: bool = False


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
SCOPES: dict[str, dict[str, Method]] = {
    "leaf": {
        "x * rsqrt(sum(x * x))": Method(_naive_leaf),
        "unit_scale()": Method(unit_scale()),
        "optax.clip_by_block_rms(1)": Method(optax.clip_by_block_rms(1.0)),
        "optax.scale_by_trust_ratio()": Method(optax.scale_by_trust_ratio(), True),
        "optax.adaptive_grad_clip(0.01)": Method(optax.adaptive_grad_clip(0.01), True),
    },
    "global": {
        "x * rsqrt(sum of all x * x)": Method(_naive_global),
        'unit_scale(scope="global")': Method(unit_scale(scope="global")),
        "optax.normalize_by_update_norm()": Method(optax.normalize_by_update_norm()),
        # After those above it always clips; at 1e9 it never does, and XLA then writes nothing.
        "optax.clip_by_global_norm(0.5)": Method(optax.clip_by_global_norm(0.5)),
        "optax.clip_by_global_norm(1e9)": Method(optax.clip_by_global_norm(1e9)),
    },
}
# What memory allows: `(updates, params) -> (updates, what else must be computed)`. A norm takes a
# read of the gradient, and the division a copy.
CEILINGS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "read": lambda updates, _: (updates, jax.tree.map(jnp.sum, updates)),
    # The sign, because 1.0001 is 1 in bfloat16, and XLA knows that there is nothing to do.
    "copy": lambda updates, _: (jax.tree.map(jnp.negative, updates), None),
}
