"""Sums over groups that neither overflow nor underflow, for the price of plain ones."""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group, Member

__all__ = ["RANGES", "SafeSum", "complex_of", "count", "real_parts", "safe_sums", "with_mesh_axes"]


class SafeSum(NamedTuple):
    """The sum of elements that were multiplied by `scale`: a power of two, 1 for the most part."""

    total: jax.Array
    scale: jax.Array


class _Range(NamedTuple):
    """The safe range of a sum, and the powers of two at which one outside it is taken again.

    Below `tiny` per element, squares that were flushed to zero can matter at the dtype's precision:
    `tiny` is smallest normal / epsilon. Above `huge`, the reciprocal of the sum, by which XLA may
    multiply instead of dividing, is near to being flushed. `up` lifts the squares of all that is
    so small into the range; `down` brings those of all that is finite into it.
    """

    tiny: float
    huge: float
    up: float
    down: float


RANGES = {
    np.dtype(np.float32): _Range(2.0**-102, 2.0**120, 2.0**80, 2.0**-100),
    np.dtype(np.float64): _Range(2.0**-969, 2.0**1016, 2.0**600, 2.0**-600),
}


def safe_sums(norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[SafeSum]:
    """Each group's sum of squares or of absolute values, or its maximum.

    Accumulated in float32, or float64 where the group holds a float64 leaf. Those that left the
    safe range are taken again at a power-of-two scale, which needs no memory but for numbers.

    Args:
      norm: "l2" for squares, "l1" for absolute values, "linf" for the maximum.
      groups: from `groups.assign`.
      leaves: the arrays that the groups' members index.

    Returns:
      One `SafeSum` a group.
    """
    if not groups:
        return []
    counts = [count(group, leaves) for group in groups]
    sums = _sums(norm, groups, leaves)
    scales = [_scale(norm, total, n) for total, n in zip(sums, counts, strict=True)]

    def retake(batches, leaves, sums, scales):
        totals = {}
        for batch in batches:
            used = {member.leaf for i in batch for member in groups[i].members}
            chosen = lax.cond(
                _all_safe(norm, [sums[i] for i in batch], [counts[i] for i in batch]),
                lambda leaves, sums, scales: sums,
                lambda leaves, sums, scales, b=batch: _sums(
                    norm, [groups[i] for i in b], leaves, scales
                ),
                [x if i in used else None for i, x in enumerate(leaves)],
                [sums[i] for i in batch],
                [scales[i] for i in batch],
            )
            totals.update(zip(batch, chosen, strict=True))
        return [totals[i] for i in range(len(groups))]

    # On GPU every check is a wait for the device. On CPU a check for several leaves waits for all
    # their norms, and a large leaf has left the cache when it is scaled.
    totals = lax.platform_dependent(
        list(leaves),
        sums,
        scales,
        cpu=functools.partial(retake, [[i] for i in range(len(groups))]),
        default=functools.partial(retake, _batches(groups, leaves)),
    )
    return [SafeSum(*pair) for pair in zip(totals, scales, strict=True)]


def _sums(
    norm: str,
    groups: Sequence[Group],
    leaves: Sequence[jax.Array],
    scales: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Each group's sum of squares or of absolute values, or its maximum, after times `scales`."""
    partials = []
    for i, group in enumerate(groups):
        dtype = _accumulator(group, leaves)
        scale = None if scales is None else scales[i]
        values = [_partial(norm, leaves[m.leaf], m.axes, dtype, scale) for m in group.members]
        partials.append(with_mesh_axes(group, values))
    return mesh.combine(partials, "max" if norm == "linf" else "sum")


def _partial(
    norm: str, x: jax.Array, axes: tuple[int, ...], dtype: np.dtype, scale: jax.Array | None
) -> jax.Array:
    parts = real_parts(x, dtype)
    if scale is not None:
        # Tied to the leaf, for leaves of one shape that shared a scale would also share its
        # broadcast: a temporary of their size.
        own, _ = lax.optimization_barrier((scale, x))
        parts = [lax.mul(part, lax.expand_dims(own, axes)) for part in parts]
    if norm == "l2":
        squares = [lax.mul(part, part) for part in parts]
        return lax.reduce_sum(squares[0] if len(parts) == 1 else lax.add(*squares), axes)
    reduce = lax.reduce_max if norm == "linf" else lax.reduce_sum
    return reduce(lax.abs(complex_of(parts)), axes)


def _all_safe(norm: str, sums: Sequence[jax.Array], counts: Sequence[int]) -> jax.Array:
    """Whether no sum must be taken again. Numbers are stacked, or XLA compiles for minutes."""
    stacks: dict[object, list[tuple[jax.Array, int]]] = {}
    for i, (total, count) in enumerate(zip(sums, counts, strict=True)):
        stacks.setdefault(i if total.ndim else total.dtype, []).append((total, count))
    checks = []
    for pairs in stacks.values():
        total = jnp.stack([total for total, _ in pairs])
        count = np.reshape([count for _, count in pairs], (-1, *(1,) * (total.ndim - 1)))
        floor, ceiling = _limits(norm, total.dtype, count)
        checks.append(jnp.all((total >= floor) & (total <= ceiling)))
    return functools.reduce(lax.bitwise_and, checks)


def _scale(norm: str, total: jax.Array, count: int) -> jax.Array:
    """The power of two at which to take `total` again, 1 where it is good as it is."""
    safe = RANGES[total.dtype]
    floor, ceiling = _limits(norm, total.dtype, count)
    up, one, down = (lax.full_like(total, choice) for choice in (safe.up, 1, safe.down))
    # NaN is not below the floor and goes the way of what is too large.
    return jnp.where(total < floor, up, lax.select(total <= ceiling, one, down))


def _limits(norm: str, dtype: np.dtype, count: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    safe = RANGES[dtype]
    # Only squares underflow.
    floor = count * safe.tiny if norm == "l2" else 0.0
    return np.asarray(floor, dtype), np.asarray(safe.huge, dtype)


def _batches(groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[list[int]]:
    """Groups that cross the same mesh axes: devices must agree on what they do together."""
    batches: dict[frozenset[Hashable], list[int]] = {}
    for i, group in enumerate(groups):
        axes = [mesh.axes_of(leaves[m.leaf], m.mesh_axes) for m in group.members]
        batches.setdefault(frozenset().union(*axes), []).append(i)
    return list(batches.values())


def _accumulator(group: Group, leaves: Sequence[jax.Array]) -> np.dtype:
    dtypes = {jnp.finfo(leaves[member.leaf].dtype).dtype for member in group.members}
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def with_mesh_axes(
    group: Group, values: Sequence[jax.Array]
) -> list[tuple[jax.Array, tuple[Hashable, ...]]]:
    """One value a member, each with the mesh axes over which it is still split."""
    pairs = zip(values, group.members, strict=True)
    return [(value, mesh.axes_of(value, member.mesh_axes)) for value, member in pairs]


def count(group: Group, leaves: Sequence[jax.Array]) -> int:
    """The number of elements that share each norm of the group, on all devices."""
    return sum(_elements(leaves[member.leaf], member) for member in group.members)


def real_parts(x: jax.Array, dtype: np.dtype) -> list[jax.Array]:
    """The array, or its real and imaginary parts, in another dtype."""
    parts = [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    return [lax.convert_element_type(part, dtype) for part in parts]


def complex_of(parts: Sequence[jax.Array]) -> jax.Array:
    """Undoes `real_parts`."""
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _elements(x: jax.Array, member: Member) -> int:
    here = math.prod(x.shape[axis] for axis in member.axes)
    return here * mesh.total_size(mesh.axes_of(x, member.mesh_axes))
