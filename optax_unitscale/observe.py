"""The norms that are worth logging: `gradient_norms` and `record_norms`."""

import collections
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_unitscale.groups import Group, Plan, assign, make_plan
from optax_unitscale.mesh import on_all, without_reduced
from optax_unitscale.norms import Reduction, norm_of
from optax_unitscale.paths import some

__all__ = ["RecordNormsState", "check_names", "gradient_norms", "record_norms", "recorded_norms"]

# The names of groups with the shapes of the axes that they keep: what a vector of norms holds.
Layout = tuple[tuple[str, tuple[int, ...]], ...]


class RecordNormsState(NamedTuple):
    """What `record_norms` keeps: all norms in one float32 vector, which `recorded_norms` names."""

    norms: jax.Array


def gradient_norms(
    updates: Any,
    norm: Literal["l2", "rms", "l1", "linf"] | str = "l2",
    *,
    scope: Literal["leaf", "layer", "global"] | Any = "leaf",
    axis: Any = None,
    axis_name: Any = None,
) -> dict[str, jax.Array]:
    """The norms that `unit_scale` with the same arguments divides by, by name.

    Args:
      updates: the gradient pytree.
      norm: "l2", "rms", "l1" or "linf", as in `unit_scale`.
      scope: "leaf", "layer", "global" or labels, as in `unit_scale`.
      axis: the axes that the norm runs over, as in `unit_scale`.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap`, as in `unit_scale`.

    Returns:
      A dict of float32 arrays. Its keys are the leaves' paths ("blocks/0/attn/kernel"; "updates"
      where the tree is one array), the layers' paths, "global", or the labels. An array has the
      shape of the kept axes: () unless `axis` is given. Leaves without elements have no entry.

    Raises:
      NameError: as `unit_scale`.
      TypeError: as `unit_scale`.
      ValueError: as `unit_scale`, or two groups have the same name.

    Numerics:
      Exact as in `unit_scale`, then rounded to float32: a norm beyond 3.4e38 is inf. A group with
      an infinity has norm inf, one with NaN has NaN. Under `jax.jit` beside `unit_scale`, XLA
      merges the reductions of the two.

    Examples:
      To record the norms of each step in a training loop, see `record_norms`. `norms_table` and
      `plot_norms` show them.

      >>> import jax.numpy as jnp
      >>> from optax_unitscale import gradient_norms
      >>> gradients = {"dense": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}}
      >>> {name: float(norm) for name, norm in gradient_norms(gradients).items()}
      {'dense/bias': 0.0, 'dense/kernel': 6.0}

    Source:
      The request to see gradient norms before they are clipped,
      https://github.com/google-deepmind/optax/issues/326.
    """
    plan = make_plan("gradient_norms", norm, scope, axis, axis_name)
    leaves, groups = assign(plan, updates)
    check_names(plan.caller, groups)
    return _norms(leaves, norm=plan.norm, groups=groups)


def record_norms(
    norm: Literal["l2", "rms", "l1", "linf"] | str = "l2",
    *,
    scope: Literal["leaf", "layer", "global"] | Any = "leaf",
    axis: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norms of the last gradients in the state, and changes no gradient.

    Put it where the gradients come in, first in an `optax.chain`, and read the norms with
    `recorded_norms`. The state is one float32 vector for all leaves: NaN until there is a gradient,
    and for a leaf that has none, such as a frozen one whose gradient is None. It goes through
    `optax.MultiSteps` and `optax.apply_if_finite`, which leave it as it was in a step without an
    update, and through `jax.lax.scan`, checkpoints, `optax.tree.map_params` and `nnx.Optimizer`.
    `jax_debug_nans` stops at these NaNs: call `init` in ``with jax.debug_nans(False)``. Across
    processes `jax.device_put` refuses them: place the state by `jax.jit` with `out_shardings`.

    Args:
      norm: "l2", "rms", "l1" or "linf", as in `unit_scale`.
      scope: "leaf", "layer", "global" or labels, as in `unit_scale`.
      axis: the axes that the norm runs over, as in `unit_scale`.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap`, as in `unit_scale`. There an axis
        that is kept must not be split.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `RecordNormsState`. Its `init` reads the
      parameters' shapes only, and leaves integers out. Its `update` needs `params` only
      where some leaves have no gradient.

    Raises:
      NameError: as `unit_scale`.
      TypeError: as `unit_scale`.
      ValueError: as `unit_scale`; two groups have the same name; there are more or fewer norms
        than for the parameters that `init` saw.

    Numerics:
      As `gradient_norms`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_unitscale import record_norms, recorded_norms, unit_scale
      >>> optimizer = optax.chain(record_norms(), unit_scale(), optax.sgd(0.1))
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
      >>> gradients = {"dense": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}}
      >>> _, state = optimizer.update(gradients, optimizer.init(params), params)
      >>> {name: float(norm) for name, norm in recorded_norms(state, params).items()}
      {'dense/bias': 0.0, 'dense/kernel': 6.0}

    Source:
      As `gradient_norms`. `optax.snapshot` with `gradient_norms` measures the parameters in `init`.
    """
    plan = make_plan("record_norms", norm, scope, axis, axis_name)

    def init(params):
        layout = _layout_of(plan, params)
        return RecordNormsState(jnp.full(_length(layout), jnp.nan, jnp.float32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        leaves, groups = assign(plan, updates)
        layout = _layout(plan.caller, leaves, groups)
        (length,) = state.norms.shape
        if _length(layout) != length and params is not None:
            layout = _layout_of(plan, params)
        if _length(layout) != length:
            raise ValueError(
                f"record_norms: the updates have {_length(layout)} norms, expected the {length} of "
                "the parameters that init saw. Pass the same tree; where some of its leaves have "
                "no gradient, pass params to update too."
            )
        norms = _vector(leaves, norm=plan.norm, groups=groups, layout=layout)
        return updates, RecordNormsState(norms)

    return optax.GradientTransformationExtraArgs(init, update)


def recorded_norms(
    opt_state: Any,
    params: Any,
    *,
    scope: Literal["leaf", "layer", "global"] | Any = "leaf",
    axis: Any = None,
) -> dict[str, jax.Array]:
    """The norms that `record_norms` keeps in an optimizer's state, by name.

    Args:
      opt_state: the state of an optimizer with one `record_norms` somewhere in it, also as
        `nnx.Optimizer` holds it; or such states stacked along leading axes by `jax.lax.scan`.
      params: the parameters as `init` saw them, for their paths and shapes: in Flax NNX
        ``nnx.state(model, nnx.Param)``.
      scope: what `record_norms` got.
      axis: what `record_norms` got.

    Returns:
      A dict of float32 `jax.Array`, named and shaped as those of `gradient_norms`. All are NaN
      before the first gradient; one is NaN where there is none for it.

    Raises:
      ValueError: `opt_state` holds no norms or those of several `record_norms`, or another number
        of them than `params`, `scope` and `axis` give.

    Examples:
      In TensorBoard, with ``writer = tensorboardX.SummaryWriter(folder)``, which needs neither
      PyTorch nor TensorFlow ::

        norms = recorded_norms(opt_state, params)
        for name, norm in norms.items():
            writer.add_scalar(f"grad_norms/{name}", float(norm), step)

      or `add_histogram` and `np.asarray` where `axis` keeps axes; in Weights & Biases ::

        norms = recorded_norms(opt_state, params)
        wandb.log({f"grad_norms/{name}": float(norm) for name, norm in norms.items()}, step=step)

      With two in one chain, before and after clipping, pass the part of the state that holds one.

      >>> import jax.numpy as jnp, optax
      >>> from optax_unitscale import record_norms, recorded_norms
      >>> optimizer = optax.chain(record_norms(), optax.clip(1.0), record_norms())
      >>> params = {"kernel": jnp.zeros((2, 2))}
      >>> _, state = optimizer.update({"kernel": jnp.full((2, 2), 3.0)}, optimizer.init(params))
      >>> [float(recorded_norms(part, params)["kernel"]) for part in (state[0], state[2])]
      [6.0, 2.0]
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_state)
    states = {f"opt_state{jax.tree_util.keystr(path)}": x for path, x in flat if _is_state(x)}
    if not states:
        raise ValueError(
            "recorded_norms: opt_state holds no state of record_norms, expected one. Put "
            "record_norms() into the optax.chain, and pass the state that its update returned."
        )
    if len(states) > 1:
        raise ValueError(
            f"recorded_norms: opt_state holds several states of record_norms, {some(states)}, "
            f"expected one. Pass the part that you mean, such as {next(iter(states))}."
        )
    (state,) = states.values()
    # NNX holds an array in a variable.
    (norms,) = jax.tree.leaves(state)
    layout = _layout_of(make_plan("recorded_norms", "l2", scope, axis, None), params)
    if norms.shape[-1] != _length(layout):
        raise ValueError(
            f"recorded_norms: opt_state holds {norms.shape[-1]} norms, expected {_length(layout)} "
            f"of {some(name for name, _ in layout)}. Pass the scope and axis that record_norms "
            "got, and the params that init saw; in Flax NNX they are nnx.state(model, nnx.Param). "
            "Inside optax.masked or optax.partition record_norms sees a part of them only: put it "
            "before."
        )
    named, start = {}, 0
    for name, shape in layout:
        named[name] = _slice(norms, start, shape)
        start += math.prod(shape)
    return named


@functools.partial(jax.jit, static_argnames=("norm", "groups"), inline=True)
def _norms(leaves: list[Any], *, norm: str, groups: tuple[Group, ...]) -> dict[str, jax.Array]:
    return {
        g.name: _rounded([without_reduced(leaves[i]) for i in g.leaves], norm=norm, over=g.over)
        for g in groups
    }


@functools.partial(jax.jit, static_argnames=("norm", "over"))
def _rounded(leaves: list[jax.Array], *, norm: str, over: tuple[Reduction, ...]) -> jax.Array:
    """The norm of a group in float32. Groups that are alike are traced once."""
    value, root = norm_of(norm, over, leaves)
    return (value / root / root).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("norm", "groups", "layout"), inline=True)
def _vector(leaves: list[Any], norm: str, groups: tuple[Group, ...], layout: Layout) -> jax.Array:
    norms = _norms(leaves, norm=norm, groups=groups)
    pieces = [
        on_all(norms[name]).ravel()
        if name in norms
        else jnp.full(math.prod(shape), jnp.nan, jnp.float32)
        for name, shape in layout
    ]
    return jnp.concatenate(pieces) if pieces else jnp.zeros(0, jnp.float32)


@functools.partial(jax.jit, static_argnames="shape", inline=True)
def _slice(norms: jax.Array, start: int, shape: tuple[int, ...]) -> jax.Array:
    """One program for all slices of a shape: one for each place is slow to compile."""
    piece = lax.dynamic_slice_in_dim(norms, start, math.prod(shape), norms.ndim - 1)
    return piece.reshape(*norms.shape[:-1], *shape)


def _is_state(x: Any) -> bool:
    return isinstance(x, RecordNormsState)


def _layout_of(plan: Plan, params: Any) -> Layout:
    """The layout of the norms of the parameters' gradients, which not every leaf has."""

    def has_gradient(x: Any) -> bool:
        # An Equinox model has functions for leaves too.
        is_number = hasattr(x, "dtype") or isinstance(x, float | complex)
        return is_number and jnp.issubdtype(jnp.result_type(x), jnp.inexact)

    params = jax.tree.map(lambda x: x if has_gradient(x) else None, params)
    # optax.tree.map_params calls init with a tree without leaves, which scope and axis do not fit.
    return _layout(plan.caller, *assign(plan, params)) if jax.tree.leaves(params) else ()


def _layout(caller: str, leaves: list[Any], groups: tuple[Group, ...]) -> Layout:
    check_names(caller, groups)
    # In the order of names, for the order of groups depends on which leaves have a gradient.
    return tuple(sorted((g.name, g.over[0].kept(leaves[g.leaves[0]].shape)) for g in groups))


def _length(layout: Layout) -> int:
    return sum(math.prod(shape) for _, shape in layout)


def check_names(caller: str, groups: tuple[Group, ...]) -> None:
    """Refuses groups that have the same name, of which a dict would hold one."""
    counts = collections.Counter(group.name for group in groups)
    if len(counts) < len(groups):
        raise ValueError(
            f"{caller}: several groups are named "
            f"{some(name for name, count in counts.items() if count > 1)}. Rename a key or a label."
        )
