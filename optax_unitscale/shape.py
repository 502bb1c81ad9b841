"""`scale_by_shape`: factors of a layer's shape, so that learning rates carry over to any width."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax
from numpy.lib.array_utils import normalize_axis_tuple
from optax.contrib import MuonDimensionNumbers

from optax_unitscale.layers import Layer, Layers, layers_in
from optax_unitscale.overrides import Kind, as_ints
from optax_unitscale.paths import Path, Prefix, flatten, gradients, is_tree, show

__all__ = ["scale_by_shape"]

CALLER = "scale_by_shape"
# Of fan_in and fan_out.
RULES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
    "muon": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
    "consistent_rms": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
    "sign": lambda fan_in, _: 1 / fan_in,
}


def scale_by_shape(
    rule: Literal["spectral", "muon", "consistent_rms", "sign"] | str = "spectral",
    *,
    layers: Layers | Mapping[str, Kind] | None = None,
    dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each leaf by a factor of its shape, so that layers of any width learn alike.

    Put it after `unit_scale` or `orthogonalize`. With :math:`n_{in}` inputs and :math:`n_{out}`
    outputs

    :math:`\Delta W = U \sqrt{n_{out} / n_{in}}`

    so that an input of RMS 1 changes the output by an RMS of at most 1, whatever the width: the
    best learning rate of a narrow model is then near that of a wide one.

    Args:
      rule: the factor, and in brackets what must come before.

        - "spectral": :math:`\sqrt{n_{out}/n_{in}}` [`unit_scale()` or `orthogonalize()`].
        - "muon": :math:`\sqrt{\max(1, n_{out}/n_{in})}` [`orthogonalize()`]: the spectral norm.
        - "consistent_rms": :math:`0.2 \sqrt{\max(n_{in}, n_{out})}` [`orthogonalize()`]: the RMS is
          then 0.2, as Adam's often is.
        - "sign": :math:`1/n_{in}` [`optax.scale_by_sign()` or `unit_scale("linf")`]: an input of
          RMS 1 changes no output by more than 1.
      layers: what each leaf is: what `layers_of` returned, overrides for it, or None to find it by
        names and shapes. A vector has :math:`n_{in} = 1`, and so has an embedding, whose rows are
        vectors of :math:`n_{out}` features. Batch axes, such as those of stacked layers, and
        blocks, such as the groups of a convolution, count in neither.
      dimension_numbers: as in `optax.contrib.muon`: an
        `optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)`, a pytree prefix of the
        updates with such leaves, or a callable from the updates to one. It takes precedence over
        `layers`; None leaves it to `layers`. No axes, (), have size 1.

    Returns:
      A stateless `optax.GradientTransformationExtraArgs`. Its `update` keeps the shape, dtype and
      sharding of every leaf; None, `optax.MaskedNode`, `float0` and empty leaves pass through.

    Raises:
      TypeError: a leaf is neither floating nor complex, or `dimension_numbers` holds something
        else.
      ValueError: `rule` is unknown; `layers` or `dimension_numbers` do not fit; what a leaf is
        cannot be told; or `jax.export` leaves an input or output axis open.

    Numerics:
      A factor is a Python float. A leaf is multiplied by it once, in its own dtype. Inside
      `jax.shard_map` a leaf has the shape of one device's part, and its factor would be that of
      the part: this transformation belongs outside.

    Notes:
      After `unit_scale` an update of rank one reaches the bound, and one of r equal singular
      values stays below it by a factor of :math:`\sqrt r`. An orthogonal update always reaches it,
      and so do vectors: give them a tenth of the rate, as `unit_muon` does. A gain differs from a
      bias: `unit_scale("linf")`, without a factor, is exact for it. For an embedding that is also
      the output layer, `MuonDimensionNumbers(1, 0)` takes the factor of the output layer. Scion
      takes "muon" for a first layer that sees images, "spectral" for the others and "sign" for the
      last; see `optax.partition`. For depth, multiply the steps of residual branches by 1 / depth
      with `optax.masked`.

    Examples:
      A kernel that makes 64 features of 16 may change by √(64/16) = 2, its bias by √64 = 8.

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_unitscale import scale_by_shape, unit_scale
      >>> optimizer = optax.chain(unit_scale(), scale_by_shape(), optax.sgd(0.1))
      >>> gradients = {"kernel": jnp.ones((16, 64)), "bias": jnp.ones(64)}
      >>> updates, _ = optimizer.update(gradients, optimizer.init(gradients))
      >>> {name: f"{jnp.linalg.norm(x):.1f}" for name, x in updates.items()}
      {'bias': '0.8', 'kernel': '0.2'}

    Source:
      "spectral": Yang, Simon, Bernstein 2023, "A Spectral Condition for Feature Learning",
      https://arxiv.org/abs/2310.17813. "muon": Jordan et al. 2024,
      https://kellerjordan.github.io/posts/muon/. "consistent_rms": Liu et al. 2025, "Muon is
      Scalable for LLM Training", https://arxiv.org/abs/2502.16982. "sign": Pethick et al. 2025,
      "Training Deep Learning Models with Norm-Constrained LMOs",
      https://arxiv.org/abs/2502.07529. Depth: Yang et al. 2023, "Tensor Programs VI",
      https://arxiv.org/abs/2310.02244.
    """
    if rule not in RULES:
        raise ValueError(f"{CALLER}: rule is {rule!r}, expected one of {', '.join(RULES)}.")
    if is_tree(dimension_numbers):
        dimension_numbers = _as_prefix(dimension_numbers)
    factors_of = functools.partial(_factors, RULES[rule], layers, dimension_numbers)

    def init(params):
        factors_of(params)  # What it cannot tell is an error here, not at the first step.
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = [x for _, x in gradients(CALLER, updates)]
        scaled = _multiply(leaves, factors=factors_of(updates))
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), state

    return optax.GradientTransformationExtraArgs(init, update)


# Cached on the numbers, not on the arguments that led to them, which may be made anew each time.
@functools.partial(jax.jit, static_argnames="factors", inline=True)
def _multiply(leaves: list[Any], factors: tuple[float | None, ...]) -> list[Any]:
    return [x if f is None else x * f for x, f in zip(leaves, factors, strict=True)]


def _factors(
    rule: Callable[[int, int], float],
    layers: Layers | Mapping[str, Kind] | None,
    dimension_numbers: Prefix | Callable[..., Any],
    tree: Any,
) -> tuple[float | None, ...]:
    """A factor for each leaf, None where there is nothing to multiply."""
    numbers = dimension_numbers
    if not isinstance(numbers, Prefix):
        numbers = _as_prefix(numbers(tree))
    flat = flatten(tree)
    paths = [path for path, _ in flat]
    said = zip(flat, numbers.broadcast(CALLER, tree, paths), strict=True)
    known = {
        path.name: _layer_said(value, path, np.shape(x))
        for (path, x), value in said
        if value is not None and 0 not in np.shape(x)
    }
    factors = {
        path.name: _factor(rule, path, x, layer)
        for path, x, layer in layers_in(CALLER, layers, tree, known)
    }
    return tuple(factors.get(path.name) for path in paths)


def _factor(rule: Callable[[int, int], float], path: Path, x: jax.Array, layer: Layer) -> float:
    fan_in, fan_out = layer.fans(x.shape)
    if not isinstance(fan_in, int) or not isinstance(fan_out, int):
        raise ValueError(
            f"{CALLER}: {show(path)} of shape {x.shape} has {fan_in} inputs and {fan_out} outputs, "
            "expected numbers. jax.export may leave only batch axes open."
        )
    return rule(fan_in, fan_out)


def _layer_said(numbers: Any, path: Path, shape: tuple[int, ...]) -> Layer:
    """What `dimension_numbers` say of a leaf."""
    where = f"{CALLER}: dimension_numbers gives {numbers!r} for {show(path)} of shape {shape}"
    try:
        if not isinstance(numbers, MuonDimensionNumbers):
            raise TypeError
        given = as_ints(numbers.reduction_axis), as_ints(numbers.output_axis)
    except TypeError:
        raise TypeError(
            f"{where}, expected optax.contrib.MuonDimensionNumbers of integers, or None for what "
            "layers says."
        ) from None
    try:
        inputs, outputs = (normalize_axis_tuple(axes, len(shape)) for axes in given)
        normalize_axis_tuple(inputs + outputs, len(shape))
    except ValueError:
        raise ValueError(
            f"{where}, expected axes that it has, each once. A callable can treat leaves "
            "differently."
        ) from None
    rest = tuple(axis for axis in range(len(shape)) if axis not in inputs + outputs)
    return Layer("kernel", inputs, outputs, rest)


def _as_prefix(tree: Any) -> Prefix:
    hint = " None stands for what layers says."
    return Prefix(
        "dimension_numbers", tree, lambda x: x is None or isinstance(x, MuonDimensionNumbers), hint
    )
