"""Which sums XLA:CPU is given in one loop, over which axes: by itself it would do worse."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group, Member
from optax_unitscale.leaves import accumulator, is_small

__all__ = ["Part", "drop_axes", "merge_axes", "shared_loops"]

# Leaves in one loop.
_MOST = 8


class Part(NamedTuple):
    """What one sum of a loop runs over: leaves of a group, by their numbers."""

    group: int
    leaves: tuple[int, ...]


def shared_loops(groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[list[Part]]:
    """The leaves that are added up in float64 together with others of their shape.

    XLA:CPU writes the float64 of what it sums to memory, but not for an operation that makes
    several sums; and it compiles operations that are alike once. With four leaves or more that is
    faster than a branch below 16384 elements.

    Args:
      groups: from `groups.assign`.
      leaves: the arrays that the groups' members index.

    Returns:
      The sums of each loop, two or more, over leaves of one shape and dtype.
    """
    kinds: dict[Any, list[tuple[int, int]]] = {}
    for i, group in enumerate(groups):
        is_double = accumulator(group, leaves) == np.float64
        for member in group.members:
            x = leaves[member.leaf]
            if not is_double and _is_plain(x, member):
                kinds.setdefault((x.shape, x.dtype), []).append((i, member.leaf))
    loops = []
    for found in kinds.values():
        x = leaves[found[0][1]]
        if is_small(x, 4) and len(found) >= (2 if is_small(x) else 4):
            count = -(-len(found) // _MOST)
            ends = [len(found) * i // count for i in range(1, count + 1)]
            for start, end in zip([0, *ends], ends, strict=False):
                loops.append(_parts(found[start:end]))
    return loops


def _parts(found: Sequence[tuple[int, int]]) -> list[Part]:
    """A sum for each group, but two for one group by itself."""
    parts: dict[int, tuple[int, ...]] = {}
    for group, leaf in found:
        parts[group] = (*parts.get(group, ()), leaf)
    if len(parts) > 1:
        return [Part(group, members) for group, members in parts.items()]
    ((group, members),) = parts.items()
    return [Part(group, members[::2]), Part(group, members[1::2])]


def drop_axes(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """The leaf without summed axes of size 1, which XLA:CPU counts as others."""
    ones = [axis for axis in axes if isinstance(x.shape[axis], int) and x.shape[axis] == 1]
    kept = [axis - sum(one < axis for one in ones) for axis in axes if axis not in ones]
    return lax.squeeze(x, ones), tuple(kept)


def merge_axes(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """The leaf with neighbouring axes that are summed made one: XLA:CPU adds up one axis best.

    In several it adds elements one by one, in nine or more a million of them.
    """
    if len(axes) < 2 or not _is_whole(x):
        return x, axes
    shape: list[int] = []
    merged: list[int] = []
    for axis, size in enumerate(x.shape):
        is_summed = axis in axes
        if is_summed and merged and merged[-1] == len(shape) - 1:
            shape[-1] *= size
        else:
            merged += [len(shape)] * is_summed
            shape.append(size)
    return lax.reshape(x, shape), tuple(merged)


def _is_plain(x: jax.Array, member: Member) -> bool:
    """Whether a leaf has a single norm, to which no other device adds."""
    crosses = mesh.axes_of(x, member.mesh_axes)
    return len(member.axes) == x.ndim and not crosses and _is_whole(x)


def _is_whole(x: jax.Array) -> bool:
    """Whether a leaf is surely on one device.

    Under `jax.jit` what is split over devices does not show; to change its shape would gather it.
    """
    return jax.typeof(x).sharding.mesh.empty and jax.device_count() == 1
