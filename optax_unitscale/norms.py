"""The norm that some leaves share, exact wherever in the dtype's range their elements are.

A float32 sum of squares holds norms from 2**-51 to 2**60. Outside, it is taken of the elements times
a power of two. Three ways lead to the same number:

- one pass at three scales (Blue 1978) on GPU and TPU, where a pass waits for memory;
- one pass, and a second where the first left the range, on CPU, where a pass waits for arithmetic;
- float64, which holds all these squares, for small leaves on CPU and for columns on GPU.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["Norm", "Reduction", "divide", "norm_of"]


class Reduction(NamedTuple):
    """What a norm runs over: axes of the leaf, and mesh axes, or None where JAX is to be asked."""

    axes: tuple[int, ...]
    mesh_axes: tuple[Hashable, ...] | None


class Norm(NamedTuple):
    """A norm, held as `value / root**2`; `root` is a power of two, 1 unless tiny or huge."""

    value: jax.Array
    root: jax.Array


class _Range(NamedTuple):
    """Norms from sqrt(n) * low to high are summed as they are, others at a scale of root**2."""

    low: float
    high: float
    up: float
    down: float


_RANGES = {
    np.dtype(np.float32): _Range(2.0**-51, 2.0**60, 2.0**40, 2.0**-50),
    np.dtype(np.float64): _Range(2.0**-484, 2.0**508, 2.0**300, 2.0**-300),
}
# Leaves of fewer elements are summed in float64 on CPU, where a branch costs more.
SMALL = 4096


def norm_of(kind: str, over: tuple[Reduction, ...], leaves: Sequence[jax.Array]) -> Norm:
    """The norm of some leaves together, for each index of the axes that they keep.

    Its derivative is that of the norm, and 0 where the norm is 0.
    """
    norm = _norm("l2" if kind == "rms" else kind, over, list(leaves))
    if kind == "rms":
        n = jnp.asarray(_count(over, leaves), norm.value.dtype)
        return norm._replace(value=norm.value / jnp.sqrt(n))
    return norm


def divide(x: jax.Array, norm: Norm, axes: tuple[int, ...]) -> jax.Array:
    """A leaf over its norm, rounded once to the leaf's dtype; 0 over 0 is 0."""
    value, root = (lax.expand_dims(y, axes) for y in norm)
    quotients = [_over(_opaque(part), value, root) for part in _real_parts(x, value.dtype)]
    return _complex_of(quotients).astype(x.dtype)


@jax.custom_jvp
def _over(x: jax.Array, value: jax.Array, root: jax.Array) -> jax.Array:
    is_zero = value == 0
    safe = jnp.where(is_zero, jnp.ones_like(value), value)
    if x.size == value.size:  # A number over its own magnitude is exactly 1.
        return jnp.where(is_zero, 0 * x, x * root / _opaque(safe / root))
    return x * root * jnp.where(is_zero, 0 * safe, root / safe)


@_over.defjvp
def _(primals, tangents):
    (x, value, root), (dx, dvalue, _) = primals, tangents
    # d(x/v) = dx/v - x/v * dv/v; in this order nothing leaves the range that the result is in.
    quotient, ratio = _over(x, value, root), _over(dvalue, value, jnp.ones_like(root))
    return quotient, _over(dx, value, root) - quotient * ratio


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _norm(kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> Norm:
    ways: dict[str, Callable[..., Norm]] = {"cpu": _with_branch, "default": _at_three_scales}
    if _accumulator(leaves) == np.float32:
        if all(isinstance(x.size, int) and x.size < SMALL for x in leaves):
            ways["cpu"] = _in_float64
        if any(x.ndim and x.ndim - 1 not in r.axes for x, r in zip(leaves, over, strict=True)):
            # XLA:GPU adds up columns once in a pass, not three times.
            ways["cuda"] = ways["rocm"] = _in_float64
    return lax.platform_dependent(
        leaves, **{name: functools.partial(way, kind, over) for name, way in ways.items()}
    )


def _at_three_scales(kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> Norm:
    safe = _RANGES[_accumulator(leaves)]
    plain, up, down = (_size(kind, over, leaves, root) for root in (1.0, safe.up, safe.down))
    root = _root(plain, _count(over, leaves), safe)
    return Norm(jnp.where(root > 1, up, jnp.where(root < 1, down, plain)), root)


def _with_branch(kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> Norm:
    plain = _size(kind, over, leaves, None)
    root = _root(plain, _count(over, leaves), _RANGES[plain.dtype])
    again = functools.partial(_size, kind, over, leaves, root)
    return Norm(lax.cond(jnp.all(root == 1), lambda: plain, again), root)


def _in_float64(kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> Norm:
    with jax.enable_x64(True):
        size = _size(kind, over, leaves, None, np.dtype(np.float64))
        root = _root(size, _count(over, leaves), _RANGES[np.dtype(np.float32)])
        return Norm((size * root * root).astype(np.float32), root.astype(np.float32))


def _root(size: jax.Array, n: Any, safe: _Range) -> jax.Array:
    """The root of the scale that a norm needs, which at scale 1 is `size` or out of range."""
    low = jnp.sqrt(jnp.asarray(n * safe.low**2, size.dtype))
    # NaN is in no range, and stays NaN at any scale.
    root = jnp.where(size <= safe.high, 1.0, safe.down)
    return jnp.where(size < low, safe.up, root).astype(size.dtype)


def _size(kind, over, leaves, root, dtype=None) -> jax.Array:
    """The norm times root**2, by plain sums; where they leave the range, so does it."""
    dtype = dtype or _accumulator(leaves)
    sums = [_sum(kind, x, r.axes, dtype, root) for x, r in zip(leaves, over, strict=True)]
    across, within = (lax.pmax, jnp.max) if kind == "linf" else (lax.psum, jnp.sum)
    mesh_axes = [_mesh_axes(x, r) for x, r in zip(leaves, over, strict=True)]
    sums = [across(s, axes) if axes else s for s, axes in zip(sums, mesh_axes, strict=True)]
    # Behind a barrier: thousands of leaves would otherwise be slow to compile.
    total = within(lax.optimization_barrier(jnp.stack(sums)), 0) if len(sums) > 1 else sums[0]
    return jnp.sqrt(total) if kind == "l2" else total


def _sum(kind: str, leaf: jax.Array, axes: tuple[int, ...], dtype: Any, root: Any) -> jax.Array:
    """The sum of squares or magnitudes of a leaf times root**2, or the largest; None stands for 1."""
    if isinstance(root, float):
        scale = np.asarray(root**2, dtype)
        parts = [_opaque(_opaque(part) * scale) for part in _real_parts(leaf, dtype)]
    else:  # On CPU a barrier does, where XLA's library of sums takes nothing `_opaque`.
        x, root = lax.optimization_barrier((leaf, root))
        parts = _real_parts(x, dtype)
        if root is not None:
            parts = [_times(part, root, axes) for part in parts]
    if kind == "l2":
        return jnp.sum(functools.reduce(lax.add, [part * part for part in parts]), axes)
    magnitude = jnp.abs(_complex_of(parts))
    if kind == "l1":
        return jnp.sum(magnitude, axes)
    # A maximum can lose NaN, on CPU and between devices, but no infinity, which is NaN in the end.
    is_nan = jnp.isnan(_sum("l2", leaf, axes, dtype, root))
    return jnp.where(is_nan, jnp.inf, jnp.max(magnitude, axes))


@_norm.defjvp
def _(kind, over, primals, tangents):
    (leaves,), (slopes,) = primals, tangents
    norm = _norm(kind, over, leaves)
    dtype = norm.value.dtype
    sums, ties = [], []
    for x, dx, r in zip(leaves, slopes, over, strict=True):
        x, dx = (_complex_of(_real_parts(y, dtype)) for y in (x, dx))
        # The derivative is the inner product of the tangent with this.
        dual = divide(x, norm, r.axes) if kind == "l2" else _sign(x)
        if kind == "linf":
            magnitude = jnp.abs(_times(x, norm.root, r.axes))
            # That of a complex number may have been rounded otherwise.
            least = norm.value * (1 - 4 * jnp.finfo(dtype).eps * jnp.iscomplexobj(x))
            hit = magnitude >= lax.expand_dims(least.astype(dtype), r.axes)
            dual = dual * hit.astype(dual.dtype)
            ties.append(jnp.sum(hit.astype(dtype), r.axes))
        pairs = zip(_real_parts(dual, dtype), _real_parts(dx, dtype), strict=True)
        products = [d * _times(t, norm.root, r.axes) for d, t in pairs]
        sums.append(jnp.sum(functools.reduce(lax.add, products), r.axes))

    def together(values: list[jax.Array]) -> jax.Array:
        pairs = [(v, _mesh_axes(x, r)) for v, x, r in zip(values, leaves, over, strict=True)]
        return sum(lax.psum(v, axes) if axes else v for v, axes in pairs)

    slope = together(sums) / together(ties) if ties else together(sums)
    return norm, Norm(slope, jnp.zeros_like(norm.root))


def _times(x: jax.Array, root: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    root = lax.expand_dims(root, axes).astype(x.dtype)
    return x * root * root


def _opaque(x: jax.Array) -> jax.Array:
    """Rounds to more bits than there are, which XLA does not look through.

    Else it would take x = c * y apart, and square c, or multiply it with a scale, by itself: that
    can leave the range where x does not.
    """
    info = jnp.finfo(x.dtype)
    if info.bits > 32:  # XLA:TPU cannot round float64.
        return lax.optimization_barrier(x)
    return lax.reduce_precision(x, info.nexp + 1, info.nmant + 1)


def _sign(x: jax.Array) -> jax.Array:
    """Each element over its magnitude, which of a complex number can be out of its parts' range."""
    x = x * np.asarray(0.25, x.dtype)
    return divide(x, Norm(jnp.abs(x), jnp.ones_like(jnp.abs(x))), ())


def _mesh_axes(x: jax.Array, over: Reduction) -> tuple[Hashable, ...]:
    """Those that a leaf is split over; JAX knows in `jax.shard_map` with `check_vma=True`."""
    if over.mesh_axes is not None:
        return over.mesh_axes
    aval = jax.typeof(x)
    varying = aval.mat.varying if hasattr(aval, "mat") else aval.vma  # Before JAX 0.10.
    return tuple(sorted(varying, key=str))


def _count(over: tuple[Reduction, ...], leaves: Sequence[jax.Array]) -> Any:
    """How many elements share each norm, on all devices; symbolic where jax.export leaves it open."""
    counts = []
    for x, r in zip(leaves, over, strict=True):
        devices = math.prod(lax.axis_size(name) for name in _mesh_axes(x, r))
        counts.append(math.prod(x.shape[axis] for axis in r.axes) * devices)
    return sum(counts)


def _accumulator(leaves: Sequence[jax.Array]) -> np.dtype:
    is_double = any(jnp.finfo(x.dtype).dtype == np.float64 for x in leaves)
    return np.dtype(np.float64 if is_double else np.float32)


def _real_parts(x: jax.Array, dtype: Any) -> list[jax.Array]:
    parts = [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    return [part.astype(dtype) for part in parts]


def _complex_of(parts: list[jax.Array]) -> jax.Array:
    return lax.complex(*parts) if len(parts) == 2 else parts[0]
