"""`clip_norm`: the Optax transformation that scales down groups whose norm exceeds a limit."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_unitscale.groups import check_scalar, make_plan, map_groups
from optax_unitscale.norms import Norm, Reduction, divide, norm_of

__all__ = ["clip_norm"]


def clip_norm(
    max_norm: jax.typing.ArrayLike,
    norm: Literal["l2", "rms", "l1", "linf"] | str = "l2",
    *,
    scope: Literal["leaf", "layer", "global"] | Any = "leaf",
    axis: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each group of gradient elements down to a norm of at most `max_norm`.

    For every group :math:`x` (a tensor, a slice of it, a layer, or the whole tree)

    :math:`u = x \min(1, m / \|x\|), \qquad 0 \mapsto 0`

    with :math:`m` = `max_norm`. ``clip_norm(1.0, scope="global")`` does what
    ``optax.clip_by_global_norm(1.0)`` does, without overflow or underflow.

    Args:
      max_norm: scalar in [0, ∞), in the units of the norm; may be traced. A schedule goes through
        `optax.inject_hyperparams`.
      norm: "l2", "rms", "l1" or "linf", as in `unit_scale`.
      scope: "leaf", "layer", "global" or labels, as in `unit_scale`.
      axis: the axes that the norm runs over, as in `unit_scale`.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap`, as in `unit_scale`.

    Returns:
      A stateless `optax.GradientTransformationExtraArgs`. Its `update` keeps the shape, dtype and
      sharding of every leaf; None, `optax.MaskedNode`, `float0` and empty leaves pass through.

    Raises:
      NameError, TypeError, ValueError: as `unit_scale`.

    Numerics:
      A group within the limit stays as it is, bit for bit. Longer ones are computed in float32, or
      in float64 where a leaf of the group has it, and rounded once. The norm is exact as in
      `unit_scale`, also where squares overflow or vanish. If an element is NaN or infinite, the
      whole group becomes NaN.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_unitscale import clip_norm
      >>> clip = clip_norm(1.0)
      >>> gradients = {"kernel": jnp.array([3e30, 4e30]), "bias": jnp.array([0.3, 0.4])}
      >>> updates, _ = clip.update(gradients, clip.init(gradients))
      >>> print(updates["kernel"].round(3), updates["bias"])
      [0.6 0.8] [0.3 0.4]

    Source:
      Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks",
      https://arxiv.org/abs/1211.5063.
    """
    plan = make_plan("clip_norm", norm, scope, axis, axis_name)
    limit = check_scalar("clip_norm", "max_norm", max_norm)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return map_groups(_clipped, plan, updates, limit), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _clipped(
    leaves: list[jax.Array],
    limit: jax.typing.ArrayLike,
    norm: str,
    over: tuple[Reduction, ...],
) -> list[jax.Array]:
    """The leaves of one group, shortened to the limit."""
    value, root = norm_of(norm, over, leaves)
    is_within = value <= jnp.asarray(limit).astype(value.dtype) * root * root
    # A group within the limit stays as it is. Its quotient, which is not used, is by 1: jnp.where
    # has a finite derivative only where both of its values have one.
    one = jnp.ones_like(root)
    by = Norm(jnp.where(is_within, one, value), jnp.where(is_within, one, root))
    clipped = []
    for x, reduction in zip(leaves, over, strict=True):
        is_kept = jnp.expand_dims(is_within, reduction.axes)
        clipped.append(jnp.where(is_kept, x, divide(x, by, reduction.axes, limit)))
    return clipped
