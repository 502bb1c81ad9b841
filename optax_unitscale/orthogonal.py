"""`orthogonalize`: the nearest semi-orthogonal matrix to each kernel, by a few matrix products."""

import collections
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_unitscale.coefficients import Steps, Triple, steps_of
from optax_unitscale.layers import Layer, Layers, layers_in
from optax_unitscale.mesh import partitions, reduced_as, varying_axes, without_reduced
from optax_unitscale.norms import Reduction, divide, norm_of
from optax_unitscale.paths import Path, gradients, show
from optax_unitscale.spread import Stack, spread

__all__ = ["orthogonalize"]

# Elements that an accelerator works on at a time.
BATCH = 2**24
# What an accelerator computes while it receives a byte from its neighbours: TPU v5e about 1000 or
# 2000, as its links are used, TPU v5p 800 to 2300, H100 with NVLink 2200.
FLOPS_A_BYTE = 2000


def orthogonalize(
    *,
    layers: Layers | Mapping[str, Any] | None = None,
    coefficients: Literal["polar_express", "muon", "aol"] | str | tuple[Triple, ...] = (
        "polar_express"
    ),
    steps: int = 5,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each kernel with nearly the closest matrix whose singular values are all 1.

    For a kernel :math:`x = U \Sigma V^\top`, the orthogonal factor by `steps` of Newton-Schulz

    :math:`x \mapsto U V^\top, \qquad X_0 = x / \|x\|_F, \quad
    X \leftarrow a X + (b A + c A^2) X, \quad A = X X^\top, \qquad 0 \mapsto 0`

    which is the direction of steepest descent in the spectral norm. Embeddings and vectors pass
    through. Put it after the momentum; `scale_by_shape` then gives each layer its length.
    `unit_muon` is the whole optimizer.

    Args:
      layers: what each leaf is: what `layers_of` returned, overrides for it, such as
        ``{"**/qkv/kernel": Kernel(inputs=0, outputs=(1, 2))}``, or None to find it from names and
        shapes. Each matrix is its inputs by its outputs. Along batch axes and in the blocks of a
        kernel, such as stacked layers, experts, gates and groups, each is by itself.
      coefficients: (a, b, c) of each step. In exact arithmetic a singular value of s times
        the Frobenius norm becomes, after 5 steps:

        ===============  ==================  ==================
        coefficients     s from 0.001 to 1   s from 0.01 to 1
        ===============  ==================  ==================
        "polar_express"  0.84 to 1.13        0.87 to 1.13
        "muon"           0.47 to 1.21        0.68 to 1.14
        "aol"            0.34 to 1.06        0.94 to 0.98
        ===============  ==================  ==================

        "polar_express" goes on to 1: 0.993 to 1.002 after 6 steps, within 2e-5 after 7. "muon" is
        one triple again and again. "aol" first divides each row of the matrix, short side first,
        by the root of the sum of that row of :math:`|A|`. Its s, U and V are those of the divided
        matrix. That makes small s larger, so that 4 steps do what the others need 5 for. A tuple
        has a triple for each step.
      steps: how many, at least 1. Those beyond a name's triples repeat the last one.

    Returns:
      A stateless `optax.GradientTransformationExtraArgs`. Its `update` keeps the shape, dtype and
      sharding of every leaf; None, `optax.MaskedNode`, `float0` and empty leaves pass through.

    Raises:
      TypeError: a leaf is neither floating nor complex; `coefficients` or `steps` has the
        wrong type or is traced.
      ValueError: what a leaf is cannot be told, as `layers_of`, also at `init`; `coefficients` is
        unknown or has not one triple for each step; in `jax.shard_map` a kernel varies over mesh
        axes; `jax.export` leaves an axis of a kernel open, as it may those of the data.

    Numerics:
      The Frobenius norm is exact as in `unit_scale`: a matrix of any magnitude in the dtype's
      normal range gives the same result, a matrix of zeros stays zero, and one with NaN or an
      infinity becomes NaN, alone of its stack. There is no epsilon. On CPU the products are in
      float32, whatever `jax.default_matmul_precision` says. On accelerators they are of bfloat16
      with float32 sums, and the result is right to a few hundredths. float64 and complex leaves
      keep their precision everywhere. Singular values below the precision of the products, 1e-7 or
      4e-3 of the largest, are noise, which five steps can amplify a thousandfold, as in all such
      methods.

    Notes:
      Matrices of one shape and dtype, short side first, are one batch, whichever leaves they are
      in. CPU takes one after the other, so that each stays in the cache.

      Across devices. Inside `jax.set_mesh(mesh)`, or where mesh axes are explicit, each matrix
      comes whole to one device, is processed there and goes back: the numbers are those of one
      device, and no product is computed twice. Each mesh axis that splits the kernels costs one
      all-to-all there and one back. Kernels whose names differ in numbers only, such as
      "blocks/3/up", are assumed to be split alike; if they are not, more is sent.

      It is fastest if the number of matrices of a shape is a multiple of the number of devices. The
      rest, or all where there are fewer, are spread over some mesh axes. Over the others large
      matrices, of thousands of inputs and outputs, are split by the columns of the longer side:
      their products are shared, but in each step devices send each other matrices of the shorter
      side squared. Small ones are processed by several devices alike. Where a mesh is automatic,
      JAX does not show how kernels are split, and XLA may split what comes back from columns over
      more axes: then state `out_shardings` of `jax.jit`.

      Where JAX sees no mesh, as with `jax.jit` on arrays of an automatic mesh outside
      `jax.set_mesh`, XLA splits the products as it likes: the result is right, but each of the
      steps needs collectives.

      In `jax.shard_map` a part of a matrix would give something else than a part of the result.
      With `check_vma=True` a kernel that varies over a mesh axis is an error. With
      `check_vma=False` and in `jax.pmap` JAX knows nothing: every device must hold whole matrices.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_unitscale import orthogonalize
      >>> tx = orthogonalize(steps=8)
      >>> gradients = {"kernel": jnp.array([[3e-30, 0.0], [0.0, -4e-33]]), "bias": jnp.ones(2)}
      >>> updates, _ = tx.update(gradients, tx.init(gradients))
      >>> print(updates["kernel"].round(3), updates["bias"])
      [[ 1.  0.]
       [ 0. -1.]] [1. 1.]

    Source:
      Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon. Bernstein, Newhouse
      2024, "Old Optimizer, New Norm", https://arxiv.org/abs/2409.20325.
    """
    chosen = steps_of(coefficients, steps)

    def init(params):
        layers_in("orthogonalize", layers, params)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        flat = gradients("orthogonalize", updates)
        # By name, for an NNX module has other keys than its state.
        known = {path.name: layer for path, _, layer in layers_in("orthogonalize", layers, updates)}
        kernels = [_kernel(path, x, known.get(path.name)) for path, x in flat]
        plain = [without_reduced(x) if k else x for (_, x), k in zip(flat, kernels, strict=True)]
        results = _orthogonalize(plain, kernels=tuple(kernels), steps=chosen)
        pairs = zip(flat, kernels, results, strict=True)
        results = [reduced_as(x, y) if kernel else y for (_, x), kernel, y in pairs]
        return jax.tree.unflatten(jax.tree.structure(updates), results), state

    return optax.GradientTransformationExtraArgs(init, update)


def _kernel(path: Path, x: jax.Array, layer: Layer | None) -> tuple[Layer, str] | None:
    """What a kernel is, and its name without numbers, if the leaf is one; its type is checked."""
    if layer is None or layer.kind != "kernel":
        return None
    if not all(isinstance(size, int) for size in x.shape):
        raise ValueError(
            f"orthogonalize: {show(path)} has shape {x.shape}, expected numbers. "
            "jax.export may leave axes of the data open, such as the batch, and none of a kernel."
        )
    partitions("orthogonalize", path, x)
    if axes := varying_axes(x):
        raise ValueError(
            f"orthogonalize: {show(path)} of shape {x.shape} varies over {axes} in jax.shard_map: "
            "it may be a part of a matrix, whose orthogonal matrix is not a part of the whole "
            "one's. Call the optimizer outside, under jax.jit; or, where every device has whole "
            "matrices, in jax.shard_map(check_vma=False)."
        )
    return layer, re.sub(r"\d+", "", path.name)


@functools.partial(jax.jit, static_argnames=("kernels", "steps"), inline=True)
def _orthogonalize(
    leaves: list[Any],
    *,
    kernels: tuple[tuple[Layer, str] | None, ...],
    steps: Steps,
) -> list[Any]:
    groups = collections.defaultdict(list)
    for i, (x, kernel) in enumerate(zip(leaves, kernels, strict=True)):
        if kernel:
            mesh = jax.typeof(x).sharding.mesh
            groups[*sorted(kernel[0].fans(x.shape)), x.dtype, mesh].append(i)
    leaves, function = list(leaves), functools.partial(_each, steps=steps)
    for (rows, columns, *_), members in groups.items():
        # Each step has 4 rows**2 * columns + 2 rows**3 FLOPs; devices that share a matrix receive
        # 8 bytes for each element of A in it, 4 to add it up and 2 each for it and the polynomial.
        work = (4 * columns + 2 * rows) / 8 / FLOPS_A_BYTE
        layers, names = zip(*(kernels[i] for i in members), strict=True)
        own = [leaves[i] for i in members]
        for i, x in zip(
            members, spread(function, _matrices, layers, names, own, work), strict=True
        ):
            leaves[i] = x
    return leaves


def _matrices(layer: Layer, x: jax.Array) -> Stack:
    """The matrices of a kernel, short side first."""
    rows, columns = layer.fans(x.shape)
    x = x.transpose(layer.batch + layer.inputs + layer.outputs)
    x = x.reshape(-1, rows, layer.blocks, columns).swapaxes(1, 2).reshape(-1, rows, columns)
    return x if rows <= columns else x.swapaxes(1, 2)


def _each(stack: Stack, axes: tuple[str, ...], steps: Steps) -> Stack:
    """The polar factor of each matrix of a stack, whose columns are split over mesh axes."""
    # Those whose columns are split are large. XLA:TPU makes no reduce-scatter of a batch.
    most = min(len(stack), BATCH // math.prod(stack.shape[1:])) if not axes else 1
    one, several = (functools.partial(_polar, axes, steps, narrow) for narrow in (False, True))
    return lax.platform_dependent(
        stack,
        # One at a time, which stays in the cache.
        cpu=lambda stack: lax.map(one, stack),
        default=lambda stack: lax.map(several, stack, batch_size=most if most > 1 else None),
    )


def _polar(axes: tuple[str, ...], steps: Steps, is_narrow: bool, x: jax.Array) -> jax.Array:
    """The polar factor of one matrix, whose products are in bfloat16 if `is_narrow`.

    Each of the devices along mesh `axes` has some of its columns, and computes some rows of the
    products of square matrices.
    """
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else np.dtype(np.float32)
    narrow = jnp.bfloat16 if is_narrow and wide == np.float32 else wide
    # Not the user's jax.default_matmul_precision, which could make these bfloat16 too.
    precision = None if narrow == jnp.bfloat16 else lax.Precision.HIGHEST

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(narrow), y.astype(narrow)
        return jnp.matmul(x, y, precision=precision, preferred_element_type=wide)

    def gram_of(x: jax.Array) -> jax.Array:
        part = product(x, x.conj().T)
        if not axes:
            return part
        # Of `tiled=True` XLA for TPU v6e makes an all-reduce.
        return lax.psum_scatter(part.reshape(lax.psum(1, axes), -1, len(part)), axes)

    def whole(rows: jax.Array) -> jax.Array:
        return lax.all_gather(rows, axes, tiled=True) if axes else rows

    def step(x: jax.Array, triple: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = triple
        gram = gram_of(x)
        factor = b * gram + c * product(gram, whole(gram.astype(narrow)))
        return (a * x.astype(wide) + product(whole(factor.astype(narrow)), x)).astype(narrow), None

    unit = x.astype(wide)
    unit = divide(unit, norm_of("l2", (Reduction((0, 1), axes),), [unit]), (0, 1))
    if steps.scales_rows:
        total = whole(jnp.sum(jnp.abs(gram_of(unit)), axis=1, keepdims=True))
        safe = jnp.where(total > 0, total, 1)
        unit = unit * jnp.where(total > 0, lax.rsqrt(safe), 0).astype(wide)
    polar, _ = lax.scan(step, unit.astype(narrow), jnp.asarray(steps.triples, wide))
    return polar.astype(x.dtype)
