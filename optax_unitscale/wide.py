"""Norms in float64, which holds every square of a narrower dtype.

On CPU small leaves go through it: there a branch for what leaves the range costs more than the
wider numbers do, to run and, where leaves are many, to compile. On GPU sums over rows do.
"""

import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group, Member
from optax_unitscale.leaves import (
    accumulator,
    complex_of,
    is_small,
    opaque,
    real_parts,
    root,
    with_mesh_axes,
)
from optax_unitscale.loops import Part, shared_loops
from optax_unitscale.partials import group_partials, kind_of, sum_of, sums_in_one_loop
from optax_unitscale.sums import sums_with_rescue

__all__ = ["column_norms", "divide_small", "is_columns", "small_groups", "wide_norms"]

_Partials = list[tuple[jax.Array, tuple[Hashable, ...]]]


def small_groups(groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[bool]:
    """Which groups CPU takes in float64 as a whole."""
    done = _leaves_of(shared_loops(groups, leaves))
    return [
        accumulator(group, leaves) != np.float64
        and all(m.leaf in done or is_small(leaves[m.leaf]) for m in group.members)
        for group in groups
    ]


def wide_norms(norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """The norm of each group in float64.

    Args:
      norm: "l2", "l1" or "linf".
      groups: from `groups.assign`, without float64 leaves.
      leaves: the arrays that the groups' members index.

    Returns:
      One float64 array a group, of the shape of its kept axes.
    """
    with jax.enable_x64(True):
        taken, left = _small_partials(norm, groups, leaves)
    rescued = iter(sums_with_rescue(norm, [group for group in left if group.members], leaves))
    with jax.enable_x64(True):
        for pairs, group in zip(taken, left, strict=True):
            if group.members:
                total, scale = (lax.convert_element_type(x, np.float64) for x in next(rescued))
                scale = lax.mul(scale, scale) if norm == "l2" else scale
                pairs.append((lax.div(total, scale), ()))
        return _combined(norm, taken)


def _small_partials(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> tuple[list[_Partials], list[Group]]:
    """What leaves have of each group's sum that go through float64, and the groups without them."""
    double = np.dtype(np.float64)
    taken: list[_Partials] = [[] for _ in groups]
    loops = shared_loops(groups, leaves)
    for loop in loops:
        lots = [[leaves[i] for i in part.leaves] for part in loop]
        for part, total in zip(loop, sums_in_one_loop(norm, lots, double), strict=True):
            taken[part.group].append((total, ()))
    done = _leaves_of(loops)
    left = []
    for group, pairs in zip(groups, taken, strict=True):
        others: tuple[list[Member], list[Member]] = [], []
        for member in group.members:
            if member.leaf not in done:
                others[is_small(leaves[member.leaf])].append(member)
        large, small = (Group(group.name, tuple(members)) for members in others)
        pairs += group_partials(norm, small, leaves, double)
        left.append(large)
    return taken, left


def _leaves_of(loops: Sequence[Sequence[Part]]) -> set[int]:
    return {leaf for loop in loops for part in loop for leaf in part.leaves}


def _combined(norm: str, taken: Sequence[_Partials]) -> list[jax.Array]:
    totals = mesh.combine(taken, kind_of(norm))
    return [lax.sqrt(total) for total in totals] if norm == "l2" else totals


def is_columns(x: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether a sum over `axes` keeps the last axis and so adds rows to each other."""
    return x.ndim > 0 and x.ndim - 1 not in axes


def column_norms(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[jax.Array]:
    """The same on GPU, where leaves are added over their rows.

    Of the three sums over rows that float32 needs, XLA:GPU takes no more than two in one pass.

    Args and Returns: as `wide_norms`.
    """
    with jax.enable_x64(True):
        taken = []
        for group in groups:
            sums = [_column_sum(norm, leaves[m.leaf], m.axes) for m in group.members]
            taken.append(with_mesh_axes(group, sums))
        return _combined(norm, taken)


def _column_sum(norm: str, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    # float32 holds all squares of float16 and, but for complex numbers, all maxima; in float64
    # XLA:GPU would not take a maximum and the sum that goes with it in one pass.
    is_narrow = x.dtype == np.float16 or (norm == "linf" and not jnp.iscomplexobj(x))
    outer = ()
    if x.dtype == jnp.bfloat16 and not is_narrow:
        x, axes, outer = _split(x, axes)
    parts = real_parts(x, np.dtype(np.float32 if is_narrow else np.float64))
    if is_narrow:
        parts = [opaque(part) for part in parts]
    total = lax.convert_element_type(sum_of(norm, parts, axes, parts), np.float64)
    # XLA would make one sum of the two.
    return lax.reduce_sum(lax.optimization_barrier(total), outer) if outer else total


def _split(
    x: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """Splits the longest of the axes in four: what to sum over first, and what then.

    XLA:GPU would rather write squares to memory, in float64, than add up a thousand columns or
    less; four times as many it adds up at once.
    """
    spec = jax.typeof(x).sharding.spec
    # A size that jax.export leaves open is not an int.
    sizes = {axis: x.shape[axis] for axis in axes if isinstance(x.shape[axis], int)}
    axis = max((axis for axis in sizes if not spec[axis]), key=sizes.__getitem__, default=None)
    if axis is None:
        return x, axes, ()
    more = [(0, -x.shape[axis] % 4 if other == axis else 0, 0) for other in range(x.ndim)]
    x = lax.pad(x, np.zeros((), x.dtype), more)
    x = x.reshape(*x.shape[:axis], x.shape[axis] // 4, 4, *x.shape[axis + 1 :])
    inner = tuple(other + (other > axis) for other in axes)
    return x, inner, (axis - sum(other < axis for other in axes),)


def divide_small(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array], min_norm: jax.Array
) -> list[jax.Array]:
    """Each leaf of groups of small leaves, over the norm of its group.

    Args:
      norm: "l2", "rms", "l1" or "linf".
      groups: from `groups.assign`, of small leaves, none of them float64.
      leaves: the arrays that the groups' members index.
      min_norm: the floor of the norms, a scalar.

    Returns:
      One array for each member of each group, in their order.
    """
    norms = wide_norms("l2" if norm == "rms" else norm, groups, leaves)
    with jax.enable_x64(True):
        # Far below all norms but 0, which it keeps from 0 / 0, and far above all.
        least = lax.convert_element_type(min_norm, np.float64)
        least = lax.clamp(np.float64(1e-150), least, np.float64(1e150))
    return [
        _divide(leaves[member.leaf], inverse, member.axes)
        for group, measured in zip(groups, norms, strict=True)
        for inverse in [_invert(measured, least, root(norm, group, leaves))]
        for member in group.members
    ]


@functools.partial(jax.jit, static_argnames="root")
def _invert(norm: jax.Array, least: jax.Array, root: float) -> jax.Array:
    with jax.enable_x64(True):
        if root != 1:
            norm = lax.mul(norm, lax.full_like(norm, 1 / root))
        norm = lax.max(norm, lax.broadcast(least, norm.shape))
        # Not 1 / norm: an infinite norm has infinite elements, and NaN shows in all of the group
        # where 0 would hide it.
        return lax.div(norm, lax.mul(norm, norm))


@functools.partial(jax.jit, static_argnames="axes")
def _divide(x: jax.Array, inverse: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    with jax.enable_x64(True):
        inverse = lax.expand_dims(inverse, axes)
        parts = [lax.mul(part, inverse) for part in real_parts(x, np.dtype(np.float64))]
        return lax.convert_element_type(complex_of(parts), x.dtype)
