"""`unit_scale`: the Optax transformation that gives every group of gradients unit norm."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_unitscale.groups import check_scalar, make_plan, map_groups
from optax_unitscale.norms import Norm, Reduction, divide, norm_of

__all__ = ["unit_scale"]


def unit_scale(
    # Editors complete the literals; `str` and `Any` admit what is only known when called.
    norm: Literal["l2", "rms", "l1", "linf"] | str = "l2",
    *,
    scope: Literal["leaf", "layer", "global"] | Any = "leaf",
    axis: Any = None,
    min_norm: jax.typing.ArrayLike = 0.0,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each group of gradient elements by its norm.

    For every group :math:`x` (a tensor, a slice of it, a layer, or the whole tree)

    :math:`u = x / \max(\|x\|, m), \qquad 0 \mapsto 0`

    with :math:`m` = `min_norm`. Put it first in an `optax.chain`; the learning rate is then the
    length of each group's step. An eager call runs one jitted computation. Transformations with
    equal arguments share it, and changing `min_norm` does not compile it again.

    Args:
      norm: the norm that is 1 afterwards, of the n elements of a group: "l2", the Euclidean norm;
        "rms", the root mean square, l2/√n; "l1", the sum of magnitudes; "linf", the largest one.
      scope: which leaves share a norm. "leaf": each has its own. "layer": leaves whose paths differ
        only in the last name, such as a kernel and its bias. "global": all. Or
        labels as in `optax.partition`: leaves of equal label share a norm. Labels are a pytree
        prefix of the updates, a dict with names such as "dense/kernel" for keys, or a callable
        from the updates to either.
      axis: which axes of a leaf the norm runs over; each index along the remaining axes has its own
        norm. None (all axes), an int, a tuple of ints, a pytree prefix or dict of these as for
        `scope`, or a callable `(path, leaf) -> axes` with `path` such as "blocks/attn/kernel". For
        layers stacked by a scan there is ``stacked("blocks/**")``. Leaves that share a norm must
        agree in the shape of the axes they keep and, on explicit meshes, in how these are split.
      min_norm: scalar in [0, ∞), in the units of the norm; may be traced. Above it the update
        has unit norm; below it the update is `x / min_norm`, plain gradient descent, so that a
        constant learning rate can converge. In float32 the update may be flushed to 0 if it is
        below 1.2e-38 or if `min_norm` is above 8e37.
      axis_name: mesh axes that a norm runs over inside `jax.shard_map` or `jax.pmap`, that is,
        those that split an axis which `axis` reduces: a name, a tuple of names, () for none, or a
        callable `(path, leaf) -> names`. Under `jax.jit` alone nothing is needed. See Notes.

    Returns:
      A stateless `optax.GradientTransformationExtraArgs`. Its `update` keeps the shape, dtype and
      sharding of every leaf; None, `optax.MaskedNode`, `float0` and empty leaves pass through.

    Raises:
      NameError: `axis_name` is no mesh axis around the call.
      TypeError: a leaf is neither floating nor complex; `axis` is traced or not integers;
        `min_norm` is not a real number; a label cannot be hashed.
      ValueError: `norm`, `scope` or `min_norm` is unknown or out of range; labels or axes do not
        fit the updates; a leaf is unreduced over a mesh axis.

    Numerics:
      The norm of the result is 1 within a few units of the leaf's precision for every element in
      the dtype's normal range, except after the sequential sums described below. There is no
      epsilon. Sums are accumulated in float32, at a power-of-two scale where squares would overflow
      or vanish. They are accumulated in float64 if the group holds float64 or complex128, on CPU
      also if all its leaves have fewer than 4096 elements, and on GPU also if one of its leaves
      keeps its last axis.

      Where XLA adds one element after the other, the sum of n equal ones can be off by up to n
      units. On CPU it does so when a kept axis lies between summed ones, when a leaf has nine axes
      or more, and before JAX 0.10.2 in three axes or more. Measured over axes 0 and 2 of a leaf of
      (8192, 2, 16): 81 units for equal elements, 3 for normal samples; where XLA adds in a tree, 1.

      Subnormal elements are zero where the platform flushes them, as XLA does on CPU; elsewhere a
      norm below the smallest normal number may lose bits. Scaling a gradient by a power of two
      changes the update by at most 3 units. A group of zeros stays zero. A group with NaN or an
      infinity becomes NaN throughout, so that `optax.apply_if_finite` sees it. The derivative is
      :math:`(I - u u^\top)/\|x\|` for "l2" and 0 at zero. In float16 and bfloat16 elements are
      rounded once. Where a million elements have unit l2 norm, each is near 1e-3, and float16 loses
      bits below 6e-5: prefer "rms" there. XLA:TPU emulates float64; results on a TPU were not seen.

    Notes:
      `axis_name=None` asks JAX over which mesh axes a leaf varies. JAX knows in `jax.shard_map`
      with `check_vma=True`. It never knows in `jax.pmap` or with `check_vma=False`: there every
      device would divide by the norm of its own part, so name the axes.

      Three kinds of leaf vary over a mesh axis that the norm must not run over. One is a leaf whose
      kept axis is split. One is what each device has of its own, such as a gradient before
      `lax.pmean`. One is what `lax.all_gather(…, tiled=True)` made whole on each device: JAX cannot
      tell it from a split leaf, each device's copy is counted, and the update on 8 devices has norm
      0.354 = 1/√8. Give `axis_name=()` for such leaves, or gather by
      `lax.all_gather(…, to="invarying")` where JAX has it.

    Examples:
      J(θ) = θ² from θ = 1 with a learning rate of 0.1 steps to 0.9, where plain gradient descent
      steps to 0.8.

      >>> import jax, optax
      >>> from optax_unitscale import unit_scale
      >>> optimizer = optax.chain(unit_scale(), optax.sgd(0.1))
      >>> theta = 1.0
      >>> state = optimizer.init(theta)
      >>> updates, state = optimizer.update(jax.grad(lambda t: t**2)(theta), state)
      >>> print(f"{optax.apply_updates(theta, updates):.1f}")
      0.9

    Source:
      Hazan, Levy, Shalev-Shwartz 2015, "Beyond Convexity: Stochastic Quasi-Convex Optimization"
      (whole gradient), https://arxiv.org/abs/1507.02030. Yu et al. 2017, "Block-Normalized
      Gradient Method" (per tensor), https://arxiv.org/abs/1707.04822.
    """
    plan = make_plan("unit_scale", norm, scope, axis, axis_name)
    floor = check_scalar("unit_scale", "min_norm", min_norm)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return map_groups(_unit, plan, updates, floor), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _unit(
    leaves: list[jax.Array],
    min_norm: jax.typing.ArrayLike,
    norm: str,
    over: tuple[Reduction, ...],
) -> list[jax.Array]:
    """Divides the leaves of one group by their norm."""
    value, root = norm_of(norm, over, leaves)
    # Finite, because `divide` reads an infinite norm as infinite elements.
    floor = jnp.minimum(jnp.asarray(min_norm).astype(value.dtype), jnp.finfo(value.dtype).max)
    is_below = value < floor * root * root
    by = Norm(jnp.where(is_below, floor, value), jnp.where(is_below, jnp.ones_like(root), root))
    return [divide(x, by, reduction.axes) for x, reduction in zip(leaves, over, strict=True)]
