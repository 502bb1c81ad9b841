"""`unit_scale`: the Optax transformation that gives every group of gradients unit norm."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_unitscale.groups import Plan, assign, make_plan
from optax_unitscale.norms import ScaledNorm, divide, group_norms

__all__ = ["unit_scale"]


def unit_scale(
    norm: str = "l2",
    *,
    scope: Any = "leaf",
    axis: Any = None,
    min_norm: jax.typing.ArrayLike = 0.0,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """TODO docstring."""
    plan = make_plan("unit_scale", norm, scope, axis, axis_name)
    _check_min_norm(min_norm)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return _scale(updates, min_norm, plan=plan), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@functools.partial(jax.jit, static_argnames="plan", inline=True)
def _scale(updates: Any, min_norm: jax.typing.ArrayLike, plan: Plan) -> Any:
    leaves, groups = assign(plan, updates)
    norms = group_norms(plan.norm, groups, leaves)
    scaled = list(leaves)
    for group, measured in zip(groups, norms, strict=True):
        floor = jnp.asarray(min_norm).astype(measured.value.dtype) * measured.factor
        # An infinite norm has infinite elements: NaN shows in all of the group, 0 would hide it.
        value = jnp.where(jnp.isinf(measured.value), jnp.nan, measured.value)
        by = ScaledNorm(jnp.maximum(value, floor), measured.factor)
        for member in group.members:
            scaled[member.index] = divide(leaves[member.index], by, member.axes)
    return jax.tree.unflatten(jax.tree.structure(updates), scaled)


def _check_min_norm(min_norm: jax.typing.ArrayLike) -> None:
    if jnp.shape(min_norm) != ():
        raise ValueError(
            f"unit_scale: min_norm has shape {jnp.shape(min_norm)}, expected a scalar."
        )
    if isinstance(min_norm, jax.core.Tracer):
        return
    if not float(min_norm) >= 0 or math.isinf(float(min_norm)):
        raise ValueError(
            f"unit_scale: min_norm is {min_norm}, expected a finite number of 0 or more."
        )
