"""The norms of all groups, from their sums, and the derivative."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.division import HUGE_FACTOR, ScaledNorm, divide, divisor
from optax_unitscale.groups import Group
from optax_unitscale.leaves import accumulator, complex_of, real_parts, with_mesh_axes
from optax_unitscale.sums import RANGES, SafeSum, sums_at_every_scale, sums_with_rescue
from optax_unitscale.wide import column_norms, is_columns, wide_norms

__all__ = ["group_norms"]


# Above, a float32 norm is held times `HUGE_FACTOR`.
_HUGE = 2.0**100


def group_norms(
    norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]
) -> list[ScaledNorm]:
    """The norm of every group, exact over the whole range of the dtype.

    The derivative is that of the norm, and 0 where the norm is 0.

    Args:
      norm: "l2", "l1" or "linf"; or "rms", whose l2 norm is returned, for the rms itself can be
        below the dtype's range. The caller divides by `root`.
      groups: from `groups.assign`.
      leaves: the arrays that the groups' members index.

    Returns:
      One `ScaledNorm` a group.
    """
    norm = "l2" if norm == "rms" else norm

    @jax.custom_jvp
    def values(leaves: Sequence[jax.Array]) -> list[ScaledNorm]:
        ways = {"cpu": _on_cpu, "default": _elsewhere}
        if any(_through_double(group, leaves) for group in groups):
            ways |= {"cuda": _on_gpu, "rocm": _on_gpu}
        ways = {name: functools.partial(way, norm, groups) for name, way in ways.items()}
        return lax.platform_dependent(leaves, **ways)

    @values.defjvp
    def _(primals, tangents):
        (leaves,), (slopes,) = primals, tangents
        norms = values(leaves)
        along = _slopes(norm, groups, norms, leaves, slopes)
        return norms, [ScaledNorm(slope, jnp.zeros_like(slope)) for slope in along]

    return values(list(leaves)) if groups else []


def _elsewhere(norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[ScaledNorm]:
    return [_finish(norm, total) for total in sums_at_every_scale(norm, groups, leaves)]


def _on_cpu(norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[ScaledNorm]:
    def rescued(*where: Any) -> list[ScaledNorm]:
        return [_finish(norm, total) for total in sums_with_rescue(*where)]

    wide = [accumulator(group, leaves) != np.float64 for group in groups]
    return _partly_wide(norm, groups, leaves, wide, wide_norms, rescued)


def _on_gpu(norm: str, groups: Sequence[Group], leaves: Sequence[jax.Array]) -> list[ScaledNorm]:
    wide = [_through_double(group, leaves) for group in groups]
    return _partly_wide(norm, groups, leaves, wide, column_norms, _elsewhere)


def _partly_wide(
    norm: str,
    groups: Sequence[Group],
    leaves: Sequence[jax.Array],
    wide: Sequence[bool],
    in_double: Callable[..., list[jax.Array]],
    otherwise: Callable[..., list[ScaledNorm]],
) -> list[ScaledNorm]:
    """The norms of all groups in their order, `in_double` of those that `wide` says."""
    doubles = [group for group, is_wide in zip(groups, wide, strict=True) if is_wide]
    others = [group for group, is_wide in zip(groups, wide, strict=True) if not is_wide]
    double = map(_narrow, in_double(norm, doubles, leaves))
    single = iter(otherwise(norm, others, leaves))
    return [next(double) if is_wide else next(single) for is_wide in wide]


def _through_double(group: Group, leaves: Sequence[jax.Array]) -> bool:
    """Whether a group's norm is taken in float64 on GPU."""
    is_double = accumulator(group, leaves) == np.float64
    return not is_double and any(is_columns(leaves[m.leaf], m.axes) for m in group.members)


@functools.partial(jax.jit, static_argnames="norm")
def _finish(norm: str, measured: SafeSum) -> ScaledNorm:
    total, scale = measured
    safe = RANGES[total.dtype]
    one = lax.full_like(scale, 1)
    is_huge = lax.lt(scale, one)
    factor = lax.select(is_huge, lax.full_like(scale, HUGE_FACTOR), one)
    # factor / scale, but a division here would cut XLA's fusion of all this in two.
    undo_down = lax.full_like(scale, HUGE_FACTOR / safe.down)
    undo_up = lax.full_like(scale, 1 / safe.up)
    undo = lax.select(is_huge, undo_down, lax.select(lax.eq(scale, one), one, undo_up))
    return ScaledNorm(lax.mul(lax.sqrt(total) if norm == "l2" else total, undo), factor)


@jax.jit
def _narrow(norm: jax.Array) -> ScaledNorm:
    with jax.enable_x64(True):
        factor = lax.select(
            lax.gt(norm, lax.full_like(norm, _HUGE)),
            lax.full_like(norm, HUGE_FACTOR),
            lax.full_like(norm, 1),
        )
        value = lax.mul(norm, factor)
        return ScaledNorm(*(lax.convert_element_type(x, np.float32) for x in (value, factor)))


def _slopes(
    norm: str,
    groups: Sequence[Group],
    norms: Sequence[ScaledNorm],
    leaves: Sequence[jax.Array],
    slopes: Sequence[jax.Array],
) -> list[jax.Array]:
    """The derivative of each group's value along `slopes`: its sum of dual * slope."""
    partials, ties = [], []
    for group, by in zip(groups, norms, strict=True):
        dtype = by.value.dtype
        sums, hits = [], []
        for member in group.members:
            x = complex_of(real_parts(leaves[member.leaf], dtype))
            factor = lax.expand_dims(by.factor, member.axes)
            dual = divide(x, divisor(by), member.axes) if norm == "l2" else _signs(x)
            dual = real_parts(dual, dtype)
            if norm == "linf":
                scaled = complex_of([lax.mul(part, factor) for part in real_parts(x, dtype)])
                # The norm may come from magnitudes taken in another precision.
                slack = 4 * float(jnp.finfo(dtype).eps) if jnp.iscomplexobj(x) else 0
                least = by.value * (1 - slack)
                hit = lax.ge(lax.abs(scaled), lax.expand_dims(least, member.axes)).astype(dtype)
                dual = [part * hit for part in dual]
                hits.append(jnp.sum(hit, axis=member.axes))
            along = [lax.mul(part, factor) for part in real_parts(slopes[member.leaf], dtype)]
            products = [d * s for d, s in zip(dual, along, strict=True)]
            sums.append(jnp.sum(sum(products[1:], products[0]), axis=member.axes))
        partials.append(with_mesh_axes(group, sums))
        ties.append(with_mesh_axes(group, hits) if hits else [])
    totals = mesh.combine(partials, "sum")
    if norm != "linf":
        return totals
    return [t / n for t, n in zip(totals, mesh.combine(ties, "sum"), strict=True)]


def _signs(x: jax.Array) -> jax.Array:
    """Each element over its magnitude, 0 for 0."""
    parts = real_parts(x, jnp.finfo(x.dtype).dtype)
    # A complex number's magnitude can leave the range that its parts are in.
    is_huge = functools.reduce(lax.bitwise_or, [lax.abs(part) > 2.0**60 for part in parts])
    factor = jnp.where(is_huge, HUGE_FACTOR, 1).astype(parts[0].dtype)
    magnitude = lax.abs(complex_of([lax.mul(part, factor) for part in parts]))
    return divide(x, divisor(ScaledNorm(magnitude, factor)), ())
