"""`step_ratios`: how long each step is beside the parameters that it changes."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_unitscale.groups import Group, assign, make_plan
from optax_unitscale.mesh import without_reduced
from optax_unitscale.norms import Reduction, norm_of
from optax_unitscale.observe import check_names
from optax_unitscale.paths import flatten, some

__all__ = ["step_ratios"]


def step_ratios(
    updates: Any,
    params: Any,
    norm: Literal["l2", "rms", "l1", "linf"] | str = "l2",
    *,
    scope: Literal["leaf", "layer", "global"] | Any = "leaf",
    axis: Any = None,
    axis_name: Any = None,
) -> dict[str, jax.Array]:
    """How long each step is beside the parameters that it changes, by name.

    ‖Δ‖ / ‖p‖, also called the effective learning rate: a step of 1e-3 turns a kernel by a
    thousandth of a radian at most.

    Args:
      updates: the steps Δ, as `optax.apply_updates` adds them: what the `update` of the whole
        optimizer returns, the learning rate included.
      params: the parameters p, before or after the step. Those that `updates` have no step for,
        such as frozen ones, are left out.
      norm: "l2", "rms", "l1" or "linf", as in `unit_scale`.
      scope: "leaf", "layer", "global" or labels, as in `unit_scale`.
      axis: the axes that the norms run over, as in `unit_scale`. ``stacked("blocks/**")`` gives
        stacked layers one by one. With ``layers = layers_of(model)``, so does
        ``lambda path, x: layers[path].inputs + layers[path].outputs``, with experts too.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap`, as in `unit_scale`.

    Returns:
      A dict of float32 arrays, named and shaped as those of `gradient_norms`.

    Raises:
      TypeError: as `unit_scale`.
      ValueError: as `unit_scale`; two groups have the same name; there is no parameter for a step,
        or one of another shape.

    Numerics:
      Exact as in `gradient_norms`, also where the two norms are beyond float32 and their ratio is
      not. 0 / 0 is 0: what is zero and stays so, does not move. A step from zero is inf.

    Examples:
      `plot_norms` with ``label="step ratio"`` shows a history of them.

      >>> import jax.numpy as jnp, optax
      >>> from optax_unitscale import step_ratios, unit_scale
      >>> optimizer = optax.chain(unit_scale(), optax.sgd(0.1))
      >>> params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.zeros(2)}
      >>> gradients = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
      >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
      >>> {name: f"{ratio:.3f}" for name, ratio in step_ratios(updates, params).items()}
      {'bias': '0.000', 'kernel': '0.025'}
    """
    plan = make_plan("step_ratios", norm, scope, axis, axis_name)
    steps, groups = assign(plan, updates)
    check_names(plan.caller, groups)
    paths = [path for path, _ in flatten(updates)]
    held = {path.names: x for path, x in flatten(params)}
    values, odd = {}, []
    for i in (i for group in groups for i in group.leaves):
        value, shape = held.get(paths[i].names), steps[i].shape
        if value is None:
            odd.append(f"{paths[i].name} {shape}: none")
        elif jnp.shape(value) != shape:
            odd.append(f"{paths[i].name} {shape}: {jnp.shape(value)}")
        else:
            values[i] = jnp.asarray(value)
    if odd:
        raise ValueError(
            f"step_ratios: params do not fit the updates: {some(odd)}, expected a parameter of the "
            "same shape for each step. Pass the params that the updates are added to."
        )
    return _ratios(steps, values, norm=plan.norm, groups=groups)


@functools.partial(jax.jit, static_argnames=("norm", "groups"), inline=True)
def _ratios(
    steps: list[Any], values: dict[int, jax.Array], *, norm: str, groups: tuple[Group, ...]
) -> dict[str, jax.Array]:
    return {
        group.name: _ratio(
            [without_reduced(steps[i]) for i in group.leaves],
            [without_reduced(values[i]) for i in group.leaves],
            norm=norm,
            over=group.over,
        )
        for group in groups
    }


@functools.partial(jax.jit, static_argnames=("norm", "over"))
def _ratio(
    steps: list[jax.Array], values: list[jax.Array], *, norm: str, over: tuple[Reduction, ...]
) -> jax.Array:
    """The ratio of a group. Groups that are alike are traced once."""
    step, value = norm_of(norm, over, steps), norm_of(norm, over, values)
    dtype = jnp.result_type(step.value, value.value)
    of_step, of_value = step.value.astype(dtype), value.value.astype(dtype)
    root = value.root.astype(dtype) / step.root.astype(dtype)
    is_zero = of_value == 0
    # Twice, for the square of the root may be out of range where the result is not.
    ratio = of_step / jnp.where(is_zero, jnp.ones_like(of_value), of_value) * root * root
    return jnp.where(is_zero & (of_step > 0), jnp.inf, ratio).astype(jnp.float32)
