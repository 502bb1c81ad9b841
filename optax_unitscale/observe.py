"""`gradient_norms`: what `unit_scale` divides by, for logging."""

import collections
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_unitscale.groups import Group, assign, make_plan
from optax_unitscale.norms import norm_of
from optax_unitscale.paths import some

__all__ = ["gradient_norms"]


def gradient_norms(
    updates: Any,
    norm: Literal["l2", "rms", "l1", "linf"] | str = "l2",
    *,
    scope: Literal["leaf", "global"] | Any = "leaf",
    axis: Any = None,
    axis_name: Any = None,
) -> dict[str, jax.Array]:
    """The norms that `unit_scale` with the same arguments divides by, by name.

    Args:
      updates: the gradient pytree.
      norm: "l2", "rms", "l1" or "linf", as in `unit_scale`.
      scope: "leaf", "global" or labels, as in `unit_scale`.
      axis: the axes that the norm runs over, as in `unit_scale`.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap`, as in `unit_scale`.

    Returns:
      A dict of float32 arrays. Its keys are the leaves' paths ("blocks/0/attn/kernel"; "updates"
      where the tree is one array), "global", or the labels. An array has the shape of the kept
      axes: () unless `axis` is given. Leaves without elements have no entry.

    Raises:
      NameError: as `unit_scale`.
      TypeError: as `unit_scale`.
      ValueError: as `unit_scale`, or two groups have the same name.

    Numerics:
      Exact as in `unit_scale`, then rounded to float32: a norm beyond 3.4e38 is inf. A group with
      an infinity has norm inf, one with NaN has NaN. Under `jax.jit` beside `unit_scale`, XLA
      merges the reductions of the two.

    Examples:
      Record the norms of each step in the optimizer's state.

      >>> import jax.numpy as jnp, optax
      >>> from optax_unitscale import gradient_norms, unit_scale
      >>> optimizer = optax.chain(
      ...     optax.snapshot("grad_norms", gradient_norms), unit_scale(), optax.sgd(0.1))
      >>> gradients = {"dense": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}}
      >>> _, state = optimizer.update(gradients, optimizer.init(gradients))
      >>> {name: float(norm) for name, norm in optax.tree.get(state, "grad_norms").items()}
      {'dense/bias': 0.0, 'dense/kernel': 6.0}

      `norms_table` and `plot_norms` show them. To average over steps, record them with
      ``optax.monitor({"grad_norms": optax.measure_with_ema(gradient_norms, decay=0.9)})``, which
      Optax has from 0.2.7 on. For TensorBoard, with
      ``writer = tensorboardX.SummaryWriter(folder)``, which needs neither PyTorch nor TensorFlow,
      write each step ::

        for name, norm in norms.items():
            writer.add_scalar(f"grad_norms/{name}", float(norm), step)

      or `add_histogram` and `np.asarray` where `axis` keeps axes.

    Source:
      The request to see gradient norms before they are clipped,
      https://github.com/google-deepmind/optax/issues/326.
    """
    plan = make_plan("gradient_norms", norm, scope, axis, axis_name)
    leaves, groups = assign(plan, updates)
    counts = collections.Counter(group.name for group in groups)
    if len(counts) < len(groups):
        raise ValueError(
            "gradient_norms: several groups are named "
            f"{some(name for name, count in counts.items() if count > 1)}. Rename a key or a label."
        )
    return _norms(leaves, norm=plan.norm, groups=groups)


@functools.partial(jax.jit, static_argnames=("norm", "groups"), inline=True)
def _norms(leaves: list[Any], *, norm: str, groups: tuple[Group, ...]) -> dict[str, jax.Array]:
    named = {}
    for group in groups:
        value, root = norm_of(norm, group.over, [leaves[i] for i in group.leaves])
        named[group.name] = (value / root / root).astype(jnp.float32)
    return named
