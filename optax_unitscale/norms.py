"""The norm that some leaves share, and the division by it, accurate over the range of a dtype.

A float32 sum of n squares holds norms from about sqrt(n) * 2**-51 to 2**60. Outside that range the
sum is taken of the elements times a power of two. There are three ways to the same number
(the linf norm of real leaves needs none of them):

- On GPU and TPU, one pass takes the sum at three scales (Blue 1978). The pass waits for memory
  anyway, so the two more sums are free.
- On CPU, one pass takes the plain sum, and a second pass runs only if the first left the range.
- float64 holds every square of a narrower dtype. It is used on CPU for groups of small leaves,
  where it beats a branch, and on GPU for groups with a leaf that keeps its last axis.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_unitscale.mesh import varying_axes

__all__ = ["Norm", "Reduction", "divide", "mesh_axes", "norm_of"]


class Reduction(NamedTuple):
    """What a norm runs over: axes of a leaf, and mesh axes, or None to ask JAX for these."""

    axes: tuple[int, ...]
    mesh_axes: tuple[Hashable, ...] | None

    def kept(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The values of the kept axes, from one value for each axis, such as a shape."""
        return tuple(value for axis, value in enumerate(values) if axis not in self.axes)


class Norm(NamedTuple):
    """The norm `value / root**2`. `root**2` is the scale that elements were multiplied by.

    It is a power of two, and 1 unless the norm is tiny or huge.
    """

    value: jax.Array
    root: jax.Array


class _Range(NamedTuple):
    """Norms of n elements from sqrt(n) * low to high need no scale.

    Below, the root of the scale is `up`; above, `down`.
    """

    low: float
    high: float
    up: float
    down: float


_RANGES = {
    np.dtype(np.float32): _Range(2.0**-51, 2.0**60, 2.0**40, 2.0**-50),
    np.dtype(np.float64): _Range(2.0**-484, 2.0**508, 2.0**300, 2.0**-300),
}
# Groups whose leaves all have fewer elements are summed in float64 on CPU.
SMALL = 4096


def norm_of(kind: str, over: tuple[Reduction, ...], leaves: Sequence[jax.Array]) -> Norm:
    """The norm of some leaves together, one for each index of the axes that they keep.

    Its derivative is that of the norm, and 0 where the norm is 0.
    """
    norm = _norm("l2" if kind == "rms" else kind, over, list(leaves))
    if kind == "rms":
        count = jnp.asarray(_count(over, leaves), norm.value.dtype)
        return norm._replace(value=norm.value / jnp.sqrt(count))
    return norm


def divide(
    x: jax.Array, norm: Norm, axes: tuple[int, ...], times: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """A leaf over its norm, rounded once to the leaf's dtype; 0 / 0 is 0.

    `times`: a factor on the quotient, a scalar or one for each norm.
    """
    # Infinite elements give an infinite norm. NaN shows that in the whole group; 0, which is any
    # finite element over infinity, would hide it.
    norm = norm._replace(value=nan_for_inf(norm.value))
    factor = None
    if times is not None:
        norm, factor = _absorb_large(norm, jnp.asarray(times).astype(norm.value.dtype))
        factor = lax.expand_dims(factor, axes) if factor.ndim else factor
    value, root = (lax.expand_dims(y, axes) for y in norm)
    parts = [_quotient(_opaque(part), value, root) for part in _real_parts(x, value.dtype)]
    if factor is not None:
        parts = [part * factor for part in parts]
    return _complex_of(parts).astype(x.dtype)


def nan_for_inf(x: jax.Array) -> jax.Array:
    """The same, NaN where it is infinite; no NaN is made where it is not, for jax_debug_nans."""
    return x + 0 * x


def _absorb_large(norm: Norm, times: jax.Array) -> tuple[Norm, jax.Array]:
    """Moves the part of a factor above 1 into the norm; returns the rest, which is at most 1.

    A quotient by the norm itself can be 0 where its product with a large factor is not.
    """
    value, root = norm.value / jnp.maximum(times, 1), norm.root
    plain = value / root / root
    is_plain = (root < 1) & (plain <= _RANGES[plain.dtype].high)
    value, root = jnp.where(is_plain, plain, value), jnp.where(is_plain, 1, root)
    return Norm(value, root), jnp.minimum(times, 1)


@jax.custom_jvp
def _quotient(x: jax.Array, value: jax.Array, root: jax.Array) -> jax.Array:
    is_zero = value == 0
    divisor = jnp.where(is_zero, jnp.ones_like(value), value)
    if x.size == value.size:  # One element for each norm: x * (1 / |x|) need not be exactly 1.
        return jnp.where(is_zero, 0 * x, x * root / _opaque(divisor / root))
    return x * root * jnp.where(is_zero, 0 * divisor, root / divisor)


@_quotient.defjvp
def _(primals, tangents):
    (x, value, root), (dx, dvalue, _) = primals, tangents
    # d(x/v) = dx/v - x/v * dv/v. In this order nothing overflows if the result does not.
    quotient, ratio = _quotient(x, value, root), _quotient(dvalue, value, jnp.ones_like(root))
    return quotient, _quotient(dx, value, root) - quotient * ratio


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _norm(kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> Norm:
    ways: dict[str, Callable[..., Norm]] = {"cpu": _with_branch, "default": _at_three_scales}
    if kind == "linf" and not any(map(jnp.iscomplexobj, leaves)):
        # No magnitude leaves the range.
        ways = {"cpu": _in_one_pass, "default": functools.partial(_in_one_pass, one=1.0)}
    elif _accumulator(leaves) == np.float32:
        if all(isinstance(x.size, int) and x.size < SMALL for x in leaves):
            ways["cpu"] = _in_float64
        if any(x.ndim and x.ndim - 1 not in r.axes for x, r in zip(leaves, over, strict=True)):
            # XLA:GPU cannot fuse three column sums into one pass.
            ways["cuda"] = ways["rocm"] = _in_float64
    return lax.platform_dependent(
        leaves, **{name: functools.partial(way, kind, over) for name, way in ways.items()}
    )


def _in_one_pass(
    kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array], one: float | None = None
) -> Norm:
    """The linf norm of real leaves: no scale is needed to take it.

    `one`: 1.0 where a constant scale is taken, None on CPU, where none is.
    """
    plain = _scaled_norm(kind, over, leaves, one)
    root = _root(plain, over, leaves)
    return Norm(plain * root * root, root)


def _at_three_scales(kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> Norm:
    limits = _RANGES[_accumulator(leaves)]
    plain, up, down = (_scaled_norm(kind, over, leaves, r) for r in (1.0, limits.up, limits.down))
    root = _root(plain, over, leaves)
    return Norm(jnp.where(root > 1, up, jnp.where(root < 1, down, plain)), root)


def _with_branch(kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> Norm:
    plain = _scaled_norm(kind, over, leaves, None)
    root = _root(plain, over, leaves)
    again = functools.partial(_scaled_norm, kind, over, leaves, root)
    return Norm(lax.cond(jnp.all(root == 1), lambda: plain, again), root)


def _in_float64(kind: str, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> Norm:
    with jax.enable_x64(True):
        norm = _scaled_norm(kind, over, leaves, None, np.dtype(np.float64))
        root = _root(norm, over, leaves)
        return Norm((norm * root * root).astype(np.float32), root.astype(np.float32))


def _root(plain: jax.Array, over: tuple[Reduction, ...], leaves: list[jax.Array]) -> jax.Array:
    """The root of the scale that a norm needs, from the plain norm, which may be 0 or infinite."""
    limits = _RANGES[_accumulator(leaves)]
    low = jnp.sqrt(jnp.asarray(_count(over, leaves) * limits.low**2, plain.dtype))
    # NaN is not within the range either, and stays NaN at any scale.
    root = jnp.where(plain <= limits.high, 1.0, limits.down)
    return jnp.where(plain < low, limits.up, root).astype(plain.dtype)


def _scaled_norm(
    kind: str,
    over: tuple[Reduction, ...],
    leaves: list[jax.Array],
    root: jax.Array | float | None,
    dtype: np.dtype | None = None,
) -> jax.Array:
    """The norm times root**2, by plain sums, which may overflow or vanish."""
    dtype = dtype or _accumulator(leaves)
    over_devices, over_leaves = (lax.pmax, jnp.max) if kind == "linf" else (lax.psum, jnp.sum)
    sums = []
    for x, r in zip(leaves, over, strict=True):
        sum_at = _sum_at_constant if isinstance(root, float) else _sum_at_array
        total = sum_at(kind, x, r.axes, dtype, root)
        names = mesh_axes(x, r)
        sums.append(over_devices(total, names) if names else total)
    # Without the barrier thousands of leaves are slow to compile.
    total = over_leaves(lax.optimization_barrier(jnp.stack(sums)), 0) if len(sums) > 1 else sums[0]
    if kind == "linf":  # `_sum` returned its bits, as integers.
        return lax.bitcast_convert_type(total, dtype)
    return jnp.sqrt(total) if kind == "l2" else total


@functools.partial(jax.jit, static_argnames=("kind", "axes", "dtype", "root"))
def _sum_at_constant(
    kind: str, x: jax.Array, axes: tuple[int, ...], dtype: np.dtype, root: float
) -> jax.Array:
    """`_sum` of one leaf times a known power of two."""
    scale = np.asarray(root**2, dtype)
    parts = [_opaque(_opaque(part) * scale) for part in _real_parts(x, dtype)]
    return _sum(kind, parts, axes)


@functools.partial(jax.jit, static_argnames=("kind", "axes", "dtype"))
def _sum_at_array(
    kind: str, x: jax.Array, axes: tuple[int, ...], dtype: np.dtype, root: jax.Array | None
) -> jax.Array:
    """`_sum` of one leaf as it is, or times an array of powers of two."""
    # A barrier, because `_opaque` would keep XLA:CPU from its fast sums.
    x, root = lax.optimization_barrier((x, root))
    fours: tuple[int, ...] = ()
    if root is None and x.dtype.itemsize == 2 and dtype == np.float64:
        x, axes, fours = _by_fours(x, axes)
    parts = _real_parts(x, dtype)
    if root is not None:
        parts = [_times(part, root, axes) for part in parts]
    if kind == "linf":
        # XLA:CPU would write the integers of `_sum` to memory, and its maximum of floats can lose
        # NaN. So a sum finds NaN; behind a barrier of its own each reduction is fused.
        total = _sum("l1", _real_parts(lax.optimization_barrier(x), dtype), axes)
        largest = jnp.max(jnp.abs(_complex_of(parts)), axes)
        return _bits(jnp.where(jnp.isnan(total), jnp.nan, largest))
    total = _sum(kind, parts, axes)
    # Without the barrier XLA would make one sum of the two.
    return jnp.sum(lax.optimization_barrier(total), fours) if fours else total


def _by_fours(
    x: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """Splits the longest of the axes in two, of which the second, of size 4, is summed last.

    Otherwise XLA:GPU writes squares of 16-bit leaves to memory, in float64, before it adds columns
    up. This may go when tests/aot passes without it: it counts how often a leaf is read.
    """
    spec = jax.typeof(x).sharding.spec
    # A size that jax.export leaves open is no int.
    whole = [i for i in axes if isinstance(x.shape[i], int) and not spec[i]]
    if x.ndim - 1 in axes or not whole:
        return x, axes, ()
    axis = max(whole, key=lambda i: x.shape[i])
    padding = [(0, -x.shape[axis] % 4 if i == axis else 0, 0) for i in range(x.ndim)]
    x = lax.pad(x, np.zeros((), x.dtype), padding)
    x = x.reshape(*x.shape[:axis], x.shape[axis] // 4, 4, *x.shape[axis + 1 :])
    return x, tuple(i + (i > axis) for i in axes), (axis - sum(i < axis for i in axes),)


def _sum(kind: str, parts: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """The sum of squares or magnitudes, or for "linf" the bits of the largest magnitude."""
    if kind == "l2":
        return jnp.sum(functools.reduce(lax.add, [part * part for part in parts]), axes)
    magnitude = jnp.abs(_complex_of(parts))
    if kind == "l1":
        return jnp.sum(magnitude, axes)
    # A maximum can lose NaN, on CPU and between devices. As integers magnitudes have the same
    # order, with NaN above infinity (IEEE 754).
    return jnp.max(_bits(magnitude), axes)


def _bits(magnitude: jax.Array) -> jax.Array:
    dtype = np.dtype(f"int{8 * magnitude.dtype.itemsize}")
    # Without the sign bit, which NaN may have.
    return lax.bitcast_convert_type(magnitude, dtype) & np.iinfo(dtype).max


@_norm.defjvp
def _(kind, over, primals, tangents):
    (leaves,), (slopes,) = primals, tangents
    norm = _norm(kind, over, leaves)
    dtype = norm.value.dtype

    names = [mesh_axes(x, r) for x, r in zip(leaves, over, strict=True)]

    def total(values: list[jax.Array]) -> jax.Array:
        pairs = zip(values, names, strict=True)
        return functools.reduce(lax.add, [lax.psum(y, n) if n else y for y, n in pairs])

    products, ties = [], []
    for x, dx, r in zip(leaves, slopes, over, strict=True):
        x = _complex_of(_real_parts(x, dtype))
        # The derivative along dx is the inner product of dx with this.
        dual = divide(x, norm, r.axes) if kind == "l2" else _sign(x)
        if kind == "linf":
            magnitude = jnp.abs(_times(x, norm.root, r.axes))
            # The magnitude of a complex number may have been rounded differently.
            least = norm.value * (1 - 4 * jnp.finfo(dtype).eps * jnp.iscomplexobj(x))
            is_largest = magnitude >= lax.expand_dims(least.astype(dtype), r.axes)
            dual = dual * is_largest.astype(dual.dtype)
            ties.append(jnp.sum(is_largest.astype(dtype), r.axes))
        pairs = zip(_real_parts(dual, dtype), _real_parts(dx, dtype), strict=True)
        terms = [d * _times(t, norm.root, r.axes) for d, t in pairs]
        products.append(jnp.sum(functools.reduce(lax.add, terms), r.axes))
    slope = total(products) / total(ties) if ties else total(products)
    return norm, Norm(slope, jnp.zeros_like(norm.root))


def _times(x: jax.Array, root: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    root = lax.expand_dims(root, axes).astype(x.dtype)
    return x * root * root


def _opaque(x: jax.Array) -> jax.Array:
    """Rounds to more bits than the dtype has: it changes nothing, and XLA does not remove it.

    XLA may rewrite products of constants: (c * y)**2 becomes c**2 * y**2, and c**2 can overflow
    where c * y does not.
    """
    info = jnp.finfo(x.dtype)
    if info.bits > 32:  # XLA:TPU cannot round float64.
        return lax.optimization_barrier(x)
    return lax.reduce_precision(x, info.nexp + 1, info.nmant + 1)


def _sign(x: jax.Array) -> jax.Array:
    """Each element over its magnitude."""
    if jnp.iscomplexobj(x):  # Its magnitude can overflow, and a quarter of it vanish.
        is_large = jnp.maximum(jnp.abs(lax.real(x)), jnp.abs(lax.imag(x))) > 1
        x = x * jnp.where(is_large, 0.25, 1.0).astype(x.dtype)
    return divide(x, Norm(jnp.abs(x), jnp.ones_like(jnp.abs(x))), ())


def mesh_axes(x: jax.Array, over: Reduction) -> tuple[Hashable, ...]:
    """The mesh axes that a leaf's norm runs over."""
    return varying_axes(x) if over.mesh_axes is None else over.mesh_axes


def _count(over: tuple[Reduction, ...], leaves: Sequence[jax.Array]) -> Any:
    """How many elements share a norm, on all devices; symbolic if jax.export leaves it open."""
    counts = []
    for x, r in zip(leaves, over, strict=True):
        devices = math.prod(lax.axis_size(name) for name in mesh_axes(x, r))
        counts.append(math.prod(x.shape[axis] for axis in r.axes) * devices)
    return sum(counts)


def _accumulator(leaves: Sequence[jax.Array]) -> np.dtype:
    """The dtype that sums are taken in."""
    is_double = any(jnp.finfo(x.dtype).dtype == np.float64 for x in leaves)
    return np.dtype(np.float64 if is_double else np.float32)


def _real_parts(x: jax.Array, dtype: Any) -> list[jax.Array]:
    parts = [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    return [part.astype(dtype) for part in parts]


def _complex_of(parts: list[jax.Array]) -> jax.Array:
    return lax.complex(*parts) if len(parts) == 2 else parts[0]
