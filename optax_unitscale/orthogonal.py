"""`orthogonalize`: the nearest semi-orthogonal matrix to each kernel, by a few matrix products."""

import collections
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_unitscale.layers import Layer, Layers, layers_in
from optax_unitscale.mesh import varying_axes
from optax_unitscale.norms import Norm, Reduction, divide, norm_of
from optax_unitscale.paths import check_dtype, gradients, show
from optax_unitscale.spread import Stack, spread

__all__ = ["orthogonalize"]

Triple = tuple[float, float, float]

# Amsel et al. 2025, https://arxiv.org/abs/2505.16932, algorithm 1, before its safety factor.
_MINIMAX: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def _safer(triple: Triple, factor: float) -> Triple:
    """The same polynomial of a matrix that is divided by a factor first."""
    a, b, c = triple
    return a / factor, b / factor**3, c / factor**5


# The last triple of each is used again where there are more steps.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # As there: 1.01 for all but the last, and for the input.
    "polar_express": (
        _safer(_MINIMAX[0], 1.01**2),
        *(_safer(triple, 1.01) for triple in _MINIMAX[1:]),
        (1.875, -1.25, 0.375),
    ),
    # Jordan 2024, https://kellerjordan.github.io/posts/muon.
    "muon": ((3.4445, -4.7750, 2.0315),),
    # Boissin et al. 2025, https://arxiv.org/abs/2512.04632; these are its repository's since
    # September 2025, https://github.com/thib-s/flash-newton-schulz. The ones before, which other
    # packages copied, begin with (4.0098, -7.0585, 2.4635): that turns singular values above 0.88
    # negative, and a matrix of rank one into its opposite.
    "aol": (
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    ),
}
# Elements that an accelerator works on at a time.
BATCH = 2**24


def orthogonalize(
    *,
    layers: Layers | Mapping[str, Any] | None = None,
    coefficients: Literal["polar_express", "muon", "aol"] | str | tuple[Triple, ...] = (
        "polar_express"
    ),
    steps: int = 5,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns each kernel's update into the nearest matrix whose singular values are all one.

    For every kernel :math:`X = U \Sigma V^\top`, as a matrix of its inputs and outputs

    :math:`u = U V^\top, \qquad 0 \mapsto 0`

    by a few matrix products, :math:`X \leftarrow a X + (b A + c A^2) X` with :math:`A = X X^\top`.
    Vectors and embeddings pass through. Put it after momentum, and `scale_by_shape` after it.

    Args:
      layers: what each leaf is: what `layers_of` returned, overrides for it, or None to find it by
        names and shapes. Stacked layers, experts and the blocks of a kernel are matrices of their
        own.
      coefficients: "polar_express", "muon", "aol", or a tuple with a triple (a, b, c) a step.
      steps: the number of iterations. Two products of the short side and one with the long side
        each.

    Returns:
      A stateless `optax.GradientTransformationExtraArgs`. Its `update` keeps the shape, dtype and
      sharding of every leaf.

    Raises:
      TypeError: `steps` is traced or no int; `coefficients` are not numbers; a leaf is neither
        floating nor complex.
      ValueError: an argument is out of range; as `layers_of`; a kernel is split in `jax.shard_map`.

    Numerics:
      A matrix is first divided by its Frobenius norm, exactly as in `unit_scale`: any magnitude
      gives the same result. Zero stays zero; a matrix with NaN or an infinity becomes NaN
      throughout, and no other does. With five steps the singular values of a well-conditioned
      matrix come out between 0.85 and 1.15 by "polar_express", and between 0.65 and 1.25 by "muon".
      Values below 1e-3 of the Frobenius norm come out smaller; more steps of "polar_express" bring
      all to 1. Products are in float32 on CPU, and in bfloat16 with float32 sums elsewhere;
      float64 leaves in float64.

      Matrices of one shape are one stack. Under `jax.set_mesh`, or on explicit meshes, the stack is
      split over the mesh, so that no product is computed twice; a matrix goes to one device and
      back. Otherwise XLA decides. Inside `jax.shard_map` a part of a kernel has another polar
      factor than the whole: where JAX knows that a kernel is split (`check_vma=True`), that is an
      error.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_unitscale import orthogonalize
      >>> tx = orthogonalize(steps=8)
      >>> update = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1e-2]]) * 1e-30}
      >>> result, _ = tx.update(update, tx.init(update))
      >>> print(jnp.round(result["kernel"], 2))
      [[1. 0.]
       [0. 1.]]

    Source:
      Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon. Amsel et al. 2025,
      "The Polar Express", https://arxiv.org/abs/2505.16932.
    """
    triples = _triples(coefficients, steps)

    def init(params):
        layers_in("orthogonalize", layers, params)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        flat = gradients(updates)
        for path, x in flat:
            check_dtype("orthogonalize", path, x)
        known = {p.keys: layer for p, _, layer in layers_in("orthogonalize", layers, updates)}
        kinds = tuple(
            layer if (layer := known.get(path.keys)) and layer.kind == "kernel" else None
            for path, _ in flat
        )
        for (path, x), layer in zip(flat, kinds, strict=True):
            if layer and (axes := varying_axes(x)):
                raise ValueError(
                    f"orthogonalize: {show(path)} of shape {x.shape} varies over {axes} in "
                    "jax.shard_map, and the polar factor of a part is not a part of the polar "
                    "factor. Gather it first, or update under jax.jit with jax.set_mesh."
                )
        leaves = _orthogonalize(
            [x for _, x in flat], kinds=kinds, triples=triples, is_aol=coefficients == "aol"
        )
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), state

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnames=("kinds", "triples", "is_aol"), inline=True)
def _orthogonalize(
    leaves: list[Any], *, kinds: tuple[Layer | None, ...], triples: tuple[Triple, ...], is_aol: bool
) -> list[Any]:
    groups = collections.defaultdict(list)
    for i, layer in enumerate(kinds):
        if layer:
            x = leaves[i]
            groups[*sorted(layer.fans(x.shape)), x.dtype].append(i)
    leaves, function = list(leaves), functools.partial(_each, triples=triples, is_aol=is_aol)
    for members in groups.values():
        own = [kinds[i] for i in members], [leaves[i] for i in members]
        for i, x in zip(members, spread(function, _matrices, *own), strict=True):
            leaves[i] = x
    return leaves


def _matrices(layer: Layer, x: jax.Array) -> Stack:
    """The matrices of a kernel, short side first."""
    rows, columns = layer.fans(x.shape)
    x = x.transpose(layer.batch + layer.inputs + layer.outputs)
    x = x.reshape(-1, rows, layer.blocks, columns).swapaxes(1, 2).reshape(-1, rows, columns)
    return x if rows <= columns else x.swapaxes(1, 2)


def _each(stack: Stack, triples: tuple[Triple, ...], is_aol: bool) -> Stack:
    """The polar factor of each matrix of a stack."""
    most = max(1, BATCH // math.prod(stack.shape[1:]))
    one, several = (
        functools.partial(_polar, triples=triples, is_aol=is_aol, is_narrow=is_narrow)
        for is_narrow in (False, True)
    )
    return lax.platform_dependent(
        stack,
        # One at a time, which stays in the cache.
        cpu=lambda stack: lax.map(one, stack),
        default=lambda stack: lax.map(several, stack, batch_size=min(most, len(stack))),
    )


def _polar(x: jax.Array, triples: tuple[Triple, ...], is_aol: bool, is_narrow: bool) -> jax.Array:
    """The polar factor of one matrix, whose products are in bfloat16 if `is_narrow`."""
    wide = np.result_type(np.float32, x.dtype)
    narrow = jnp.bfloat16 if is_narrow and wide == jnp.float32 else wide
    # Not the user's jax.default_matmul_precision, which could make these bfloat16 too.
    precision = None if narrow == jnp.bfloat16 else lax.Precision.HIGHEST

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(narrow), y.astype(narrow)
        return jnp.matmul(x, y, precision=precision, preferred_element_type=wide)

    def step(x: jax.Array, triple: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = triple
        gram = product(x, x.conj().T)
        factor = b * gram + c * product(gram, gram)
        return (a * x.astype(wide) + product(factor, x)).astype(narrow), None

    unit = _unit(x.astype(wide))
    if is_aol:
        total = jnp.sum(jnp.abs(product(unit, unit.conj().T)), axis=1, keepdims=True)
        safe = jnp.where(total > 0, total, 1)
        unit = unit * jnp.where(total > 0, lax.rsqrt(safe), 0).astype(wide)
    polar, _ = lax.scan(step, unit.astype(narrow), jnp.asarray(triples, wide))
    return polar.astype(x.dtype)


def _unit(x: jax.Array) -> jax.Array:
    """A matrix over its Frobenius norm."""
    value, root = norm_of("l2", (Reduction((0, 1), ()),), [x])
    # An infinite norm has infinite elements.
    value = jnp.where(jnp.isinf(value), jnp.nan, value)
    return divide(x, Norm(value, root), (0, 1))


def _triples(coefficients: Any, steps: Any) -> tuple[Triple, ...]:
    """One for each step."""
    try:
        if isinstance(steps, jax.Array | bool):
            raise TypeError
        count = operator.index(steps)
    except TypeError:
        raise TypeError(
            f"orthogonalize: steps is {steps!r}, expected an int that is known when the update is "
            'traced. Under optax.inject_hyperparams name it: static_args=("steps",).'
        ) from None
    if count < 1:
        raise ValueError(f"orthogonalize: steps is {count}, expected at least 1.")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"orthogonalize: coefficients is {coefficients!r}, expected one of "
                f"{list(COEFFICIENTS)}, or a triple (a, b, c) for each step."
            )
        own = COEFFICIENTS[coefficients]
        return (own + own[-1:] * count)[:count]
    try:
        triples = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise TypeError(
            f"orthogonalize: coefficients is {coefficients!r}, expected one of "
            f"{list(COEFFICIENTS)}, or a tuple with a triple (a, b, c) of numbers for each step."
        ) from None
    if len(triples) != count:
        raise ValueError(
            f"orthogonalize: coefficients has {len(triples)} triples for {count} steps, expected "
            f"one for each. Give steps={len(triples)}."
        )
    return triples
