"""`gradient_norms`: what `unit_scale` divides by, for logging."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_unitscale.groups import Plan, assign, make_plan
from optax_unitscale.norms import group_norms

__all__ = ["gradient_norms"]


def gradient_norms(
    updates: Any,
    norm: str = "l2",
    *,
    scope: Any = "leaf",
    axis: Any = None,
    axis_name: Any = None,
) -> dict[str, jax.Array]:
    """TODO docstring."""
    return _norms(updates, plan=make_plan("gradient_norms", norm, scope, axis, axis_name))


@functools.partial(jax.jit, static_argnames="plan", inline=True)
def _norms(updates: Any, plan: Plan) -> dict[str, jax.Array]:
    leaves, groups = assign(plan, updates)
    norms = group_norms(plan.norm, groups, leaves)
    return {
        group.name: (n.value / n.factor).astype(jnp.float32)
        for group, n in zip(groups, norms, strict=True)
    }
