"""The plain sums that norms are made from, leaf by leaf, as XLA:CPU adds them up well."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import jax
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group
from optax_unitscale.leaves import (
    accumulator,
    complex_of,
    is_small,
    real_parts,
    with_mesh_axes,
)
from optax_unitscale.loops import drop_axes, merge_axes

__all__ = ["group_partials", "kind_of", "sum_of", "sums_in_one_loop"]

_Adder = Callable[[jax.Array, tuple[int, ...]], jax.Array]

# Before JAX 0.10.2 XLA:CPU adds all leaves up as it still does those of less than `leaves.SMALL`
# elements: in four axes up to a million elements one by one.
_HAS_NO_LIBRARY = jax.__version_info__ < (0, 10, 2)


def group_partials(
    norm: str,
    group: Group,
    leaves: Sequence[jax.Array],
    dtype: np.dtype,
    scale: jax.Array | None = None,
) -> list[tuple[jax.Array, tuple[Hashable, ...]]]:
    """What each leaf on this device has of the group's sum, for `mesh.combine`.

    Args:
      norm: "l2" for squares, "l1" for absolute values, "linf" for the maximum.
      group: from `groups.assign`.
      leaves: the arrays that the group's members index.
      dtype: what to sum in.
      scale: what to multiply elements with first, an array of the kept axes.

    Returns:
      One pair a member.
    """
    values = []
    for member in group.members:
        x, by = leaves[member.leaf], scale
        if by is not None:
            # Tied to the leaf: leaves of one shape that shared a scale would also share its
            # broadcast, a temporary of their size. And XLA cannot multiply the scale with a number
            # within the leaf.
            by, x = lax.optimization_barrier((by, x))
        is_double = accumulator(group, leaves) == np.float64
        by_axis = _HAS_NO_LIBRARY or (is_double and is_small(x))
        values.append(_sum(norm, x, member.axes, dtype, by_axis, by))
    return with_mesh_axes(group, values)


@functools.partial(jax.jit, static_argnames=("norm", "dtype"))
def sums_in_one_loop(
    norm: str, lots: Sequence[Sequence[jax.Array]], dtype: np.dtype
) -> list[jax.Array]:
    """The sum over each of several lots of leaves, all of them one operation.

    Args:
      norm: as `group_partials`.
      lots: leaves of one shape and dtype.
      dtype: what to sum in.

    Returns:
      A scalar a lot.
    """
    if norm == "linf":
        # The maximum may lose a NaN, as in `sum_of`.
        totals, largest = _reduce("l2", lots, dtype, lax.add), _reduce(norm, lots, dtype, lax.max)
        return [lax.select(lax.ne(t, t), t, x) for t, x in zip(totals, largest, strict=True)]
    return _reduce(norm, lots, dtype, lax.add)


def _reduce(
    norm: str,
    lots: Sequence[Sequence[jax.Array]],
    dtype: np.dtype,
    operation: Callable[[jax.Array, jax.Array], jax.Array],
) -> list[jax.Array]:
    def term(x: jax.Array) -> jax.Array:
        return _term(norm, _read(lax.reshape(x, (x.size,)), dtype)[1])

    terms = [functools.reduce(operation, map(term, lot)) for lot in lots]
    zeros = [np.zeros((), dtype) for _ in lots]
    return lax.reduce(terms, zeros, lambda xs, ys: list(map(operation, xs, ys)), (0,))


def _add_by_axis(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Adds up one axis after the other, where they cannot be merged.

    At once XLA:CPU would add up to a million elements one by one, or those of a block of 32 along
    every axis. Before JAX 0.10.2 it can do so with two of the axes even here.
    """
    if len(axes) < 2:
        return lax.reduce_sum(x, axes)
    for axis in sorted(axes, reverse=True):
        x = lax.optimization_barrier(lax.reduce_sum(x, (axis,)))
    return x


@functools.partial(jax.jit, static_argnames=("norm", "axes", "dtype", "by_axis"))
def _sum(
    norm: str,
    x: jax.Array,
    axes: tuple[int, ...],
    dtype: np.dtype,
    by_axis: bool,
    scale: jax.Array | None = None,
) -> jax.Array:
    x, axes = merge_axes(*drop_axes(x, axes))
    # What XLA:CPU's library of sums does not take.
    is_split = len(axes) > 1 and axes[-1] - axes[0] >= len(axes)
    add = _add_by_axis if by_axis or is_split or x.ndim > 8 else lax.reduce_sum
    x, parts = _read(x, dtype)
    if scale is not None:
        parts = [lax.mul(part, lax.expand_dims(scale, axes)) for part in parts]
    # `mesh.largest` would write its integers to memory here.
    other = _read(x, dtype)[1] if norm == "linf" else ()
    return sum_of(norm, parts, axes, other, add)


def _read(x: jax.Array, dtype: np.dtype) -> tuple[jax.Array, list[jax.Array]]:
    """A leaf, and its real parts in another dtype.

    Behind a barrier: XLA would undo a change of shape, multiply what a leaf is made of by itself
    (see `leaves.opaque`, which costs its library of sums), and write a leaf of a narrow dtype to
    memory, converted, for all that reads it.
    """
    hidden = lax.optimization_barrier(x)
    return hidden, real_parts(hidden, dtype)


def sum_of(
    norm: str,
    parts: Sequence[jax.Array],
    axes: tuple[int, ...],
    others: Sequence[jax.Array] = (),
    add: _Adder = lax.reduce_sum,
) -> jax.Array:
    """The plain sum that a norm is made from; where it overflows, it does.

    Args:
      norm: "l2" for squares, "l1" for absolute values, "linf" for the maximum.
      parts: the real parts of an array.
      axes: those of it to sum over.
      others: for "linf": XLA's maximum, which is fast but may lose a NaN, is taken together with a
        sum over these, which does not.
      add: adds up elements over axes.

    Returns:
      An array of the other axes.
    """
    term = _term(norm, parts)
    if norm != "linf":
        return add(term, axes)
    if not others:
        return mesh.largest(term, axes)
    total = sum_of("l2", others, axes)
    return lax.select(lax.ne(total, total), total, lax.reduce_max(term, axes))


def _term(norm: str, parts: Sequence[jax.Array]) -> jax.Array:
    """What is added up, or compared, element by element."""
    if norm != "l2":
        return lax.abs(complex_of(parts))
    squares = [lax.mul(part, part) for part in parts]
    return squares[0] if len(parts) == 1 else lax.add(*squares)


def kind_of(norm: str) -> Literal["sum", "max"]:
    """How `mesh.combine` combines what leaves have of a norm's sum."""
    return "max" if norm == "linf" else "sum"
