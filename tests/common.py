"""What several test files have in common: the norms, samples, and a short call."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optax_unitscale import unit_scale

__all__ = ["EMPTY", "NORMS", "sample", "scaled"]

EMPTY = optax.EmptyState()
NORMS = ["l2", "rms", "l1", "linf"]


def scaled(tree: Any, norm: str = "l2", **options: Any) -> Any:
    """The updates of one call of `unit_scale`."""
    return unit_scale(norm, **options).update(tree, EMPTY)[0]


def sample(shape, dtype, magnitude=1.0, seed=0):
    """Normal samples, none so near to zero that it would be subnormal."""
    rng = np.random.default_rng(seed)
    draws = rng.normal(size=(2, *shape))
    draws = np.where(np.abs(draws) < 0.01, 0.01, draws) * magnitude
    dtype = jnp.dtype(dtype)
    values = draws[0] + 1j * draws[1] if jnp.issubdtype(dtype, jnp.complexfloating) else draws[0]
    return values.astype(dtype)
