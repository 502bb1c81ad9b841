"""`scale_by_shape`: factors of a layer's shape, so that learning rates carry over to any width."""

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from optax_unitscale.paths import (
    Path,
    Prefix,
    check_dtype,
    gradients,
    is_float0,
    join,
    show,
)

__all__ = ["scale_by_shape"]

# Of fan_in and fan_out.
RULES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
    "muon": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
    "consistent_rms": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
    "sign": lambda fan_in, _: 1 / fan_in,
}
PROJECTIONS = ("query", "key", "value")

# A leaf's reduction and output axes.
Axes = tuple[tuple[int, ...], tuple[int, ...]]


def scale_by_shape(
    rule: Literal["spectral", "muon", "consistent_rms", "sign"] | str = "spectral",
    *,
    dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each leaf by a factor of its shape, so that layers of any width learn alike.

    Put it after `unit_scale`. With `rule="spectral"` an update of unit norm becomes

    :math:`\Delta W = U \sqrt{n_{out} / n_{in}}, \qquad \|U\|_F = 1`

    so that :math:`\|\Delta W\|_2 \le \sqrt{n_{out}/n_{in}}`: an input of RMS 1 changes the output
    by an RMS of at most 1, whatever the width. The best learning rate of a narrow model is then
    near that of a wide one.

    Args:
      rule: the factor, of the sizes :math:`n_{in}` and :math:`n_{out}` of a layer's input and
        output. In brackets, what must come before to give the result stated.

        - "spectral": :math:`\sqrt{n_{out}/n_{in}}` [`unit_scale()`]. The result is as above, with
          equality at rank one. Of a gradient few singular values matter, how many depends on the
          data rather than on the width, and so does then the share of the bound that is reached.
          With r equal ones it is :math:`1/\sqrt r`, which for a full rank would shrink as the
          layer grows. An orthogonalised update, such as Muon's, reaches the bound itself.
        - "muon": :math:`\sqrt{\max(1, n_{out}/n_{in})}` [orthogonalised]. The spectral norm is that
          factor. Scion has it for first layers that see images.
        - "consistent_rms": :math:`0.2 \sqrt{\max(n_{in}, n_{out})}` [orthogonalised]. The RMS is
          0.2, as Adam's often is. After `unit_scale()` it would be smaller by
          :math:`\sqrt{\min(n_{in}, n_{out})}`; `unit_scale("rms")` and `optax.scale(0.2)` are what
          gives 0.2 there.
        - "sign": :math:`1/n_{in}` [`optax.scale_by_sign()` or `unit_scale("linf")`]. An input of
          RMS 1 changes no output by more than 1. Scion has it for the output layer.
      dimension_numbers: which axes of a leaf :math:`n_{in}` and :math:`n_{out}` are the sizes of: a
        pytree prefix of the updates with an `optax.contrib.MuonDimensionNumbers(reduction_axis,
        output_axis)` at each leaf, or a callable from the updates to one, as in
        `optax.contrib.muon`. Axes in neither are batch axes: stacked layers, each of which is
        taken to have unit norm by itself, as `unit_scale(axis=...)` gives it. No axes, (), have
        size 1. None stands for the default, by the leaf's path in Flax, or an error:

        =================================  ============================  =====================
        path ends in                       shape                         dimension numbers
        =================================  ============================  =====================
        anything                           () or (n,)                    (), all
        `kernel`                           (in, out)                     0, 1
        `kernel` under `*conv*`, any case  (..., in, out), up to three   all but the last, the
                                           spatial axes                  last
        `query`, `key` or `value/kernel`   (in, heads, head_dim)         0, (1, 2)
        `query`, `key` or `value/bias`     (heads, head_dim)             (), (0, 1)
        `out/kernel`                       (heads, head_dim, out)        (0, 1), 2
        `embedding`                        (vocabulary, features)        (), 1
        =================================  ============================  =====================

    Returns:
      A stateless `optax.GradientTransformationExtraArgs`. Its `update` keeps the shape, dtype and
      sharding of every leaf; None, `optax.MaskedNode`, `float0` and empty leaves pass through.

    Raises:
      TypeError: a leaf is neither floating nor complex, or `dimension_numbers` holds something
        else; the callable cannot be hashed.
      ValueError: `rule` is unknown; `dimension_numbers` do not fit the updates; a leaf is none of
        those above.

    Numerics:
      A factor is a Python float, known when the update is traced; a leaf is multiplied by it once,
      in its own dtype. Sharding changes nothing under `jax.jit`; but inside `jax.shard_map` a leaf
      has the shape of one device's part, and this transformation belongs outside.

    Notes:
      Why "spectral" has these dimension numbers. Features of RMS 1 have a Euclidean norm of √n.

      - Kernel: :math:`\|\Delta W x\|_2 \le \|\Delta W\|_2 \sqrt{n_{in}}`, which is to be
        :math:`\sqrt{n_{out}}`. All input axes make up :math:`n_{in}`, all output axes
        :math:`n_{out}`; in a convolution x is the patch under the kernel. (Scion divides a k by k
        convolution by k once more, which bounds the whole image rather than each place in it.)
      - Bias: a kernel whose input is 1, so :math:`n_{in} = 1`. Of unit norm, its elements have an
        RMS of :math:`1/\sqrt n` and then of 1. It always reaches the bound, of which a kernel
        reaches a share: where that is too much, give vectors a lower learning rate.
      - Gain: a diagonal kernel, whose spectral norm, its largest element, is to be
        :math:`\sqrt{n/n} = 1`. Spread over all elements, an update of unit norm has them
        :math:`1/\sqrt n`, as a bias. For one that is not, `unit_scale("linf")` is exact, without
        this transformation.
      - Embedding: a token picks one row, a vector that acts like a bias, so the rows are a batch
        of vectors. With `unit_scale()` no row changes by an RMS of more than 1, and those of r
        tokens alike by :math:`1/\sqrt r`, whatever the width; with `unit_scale(axis=-1)` for this
        leaf, each by 1. A table that is the output layer as well is best read as that: (1, 0).
      - Output layer: a kernel as any other. A logit changes by at most :math:`\sqrt{n_{out}}`.

      What Optax already has. For layers stacked along axis 0, `jax.vmap` of `update`, inside which
      each has its own shape. For other layers other rules, `optax.partition`; so is Scion put
      together: "sign" for the output layer, "muon" for a first one that sees images, "spectral"
      for the rest. For depth, `optax.masked(optax.scale(1 / depth), branches)`, where `branches`
      is True at the residual branches' parameters: as all of them move the sum, each may by 1/L of
      a step; where the model itself multiplies its branches by 1/√L, 1/√L remains. Muon and
      Moonlight have no factor for vectors and embeddings and leave them to AdamW.

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
      Scalable for LLM Training", https://arxiv.org/abs/2502.16982. "sign", and the others
      layer by layer: Pethick et al. 2025, "Training Deep Learning Models with Norm-Constrained
      LMOs", https://arxiv.org/abs/2502.07529. Depth: Yang et al. 2023, "Tensor Programs VI",
      https://arxiv.org/abs/2310.02244.
    """
    if rule not in RULES:
        raise ValueError(f"scale_by_shape: rule is {rule!r}, expected one of {', '.join(RULES)}.")
    if not callable(dimension_numbers):
        dimension_numbers = _as_prefix(dimension_numbers)
    try:
        hash(dimension_numbers)
    except TypeError as error:
        raise TypeError(
            "scale_by_shape: dimension_numbers must be hashable, for the compiled update is cached "
            f"on it, but {error}. Pass a function."
        ) from None

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return _scale(updates, rule=rule, dimension_numbers=dimension_numbers), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@functools.partial(jax.jit, static_argnames=("rule", "dimension_numbers"), inline=True)
def _scale(updates: Any, rule: str, dimension_numbers: Prefix | Callable[..., Any]) -> Any:
    if not isinstance(dimension_numbers, Prefix):
        dimension_numbers = _as_prefix(dimension_numbers(updates))
    dimension_numbers.check_fit("scale_by_shape", "dimension_numbers", updates)
    scaled = []
    for path, x in gradients(updates):
        check_dtype("scale_by_shape", path, x)
        if not is_float0(x) and x.size > 0:
            x = x * RULES[rule](*_fans(dimension_numbers, path, x))
        scaled.append(x)
    return jax.tree.unflatten(jax.tree.structure(updates), scaled)


def _fans(dimension_numbers: Prefix, path: Path, x: jax.Array) -> tuple[int, int]:
    """The sizes of a layer's input and output."""
    is_found, axes = dimension_numbers.find(path.names)
    if not is_found:
        raise ValueError(
            f"scale_by_shape: dimension_numbers has no entry for {show(path)}, expected a pytree "
            "prefix of the updates. Add the entry; None stands for the default."
        )
    if axes is None:
        axes = _default(path, x.ndim)
    if axes is None:
        raise ValueError(
            f"scale_by_shape: {show(path)} of shape {x.shape} is no layer known by its name and "
            "rank. Give its axes in dimension_numbers: optax.contrib.MuonDimensionNumbers(-2, -1) "
            "for a dense kernel or a stack of them, ((0, 1, 2), 3) for a 2-D convolution, ((), -1) "
            "for a stack of vectors, (reduction_axis, output_axis) in general. Or leave it out "
            "with optax.masked."
        )
    reduction, output = axes
    given = reduction + output
    if len({axis % x.ndim for axis in given if -x.ndim <= axis < x.ndim}) < len(given):
        raise ValueError(
            f"scale_by_shape: dimension_numbers has reduction_axis {reduction} and output_axis "
            f"{output} for {show(path)} of shape {x.shape}, expected axes that it has, each once. "
            "A callable can treat leaves differently."
        )
    return _size(x, reduction), _size(x, output)


def _size(x: jax.Array, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def _default(path: Path, ndim: int) -> Axes | None:
    """What Flax's layers have, None for what could be several of them."""
    every = tuple(range(ndim))
    module, leaf = ("", "", *path.names)[-2:]
    match leaf, ndim:
        case _, 0 | 1:
            return (), every
        case "kernel", 2:
            return (0,), (1,)
        case "kernel", 3 if module in PROJECTIONS:
            return (0,), (1, 2)
        case "kernel", 3 if module == "out":
            return (0, 1), (2,)
        case "kernel", 3 | 4 | 5 if any("conv" in name.lower() for name in path.names):
            return every[:-1], every[-1:]
        case "bias", 2 if module in PROJECTIONS:
            return (), every
        case "embedding", 2:
            return (), (1,)
    return None


def _as_prefix(tree: Any) -> Prefix:
    prefix = Prefix(tree, lambda x: x is None or isinstance(x, MuonDimensionNumbers))
    return prefix.map(_as_tuples)


def _as_tuples(names: tuple[str, ...], value: Any) -> Axes | None:
    if value is None:
        return None
    try:
        if not isinstance(value, MuonDimensionNumbers):
            raise TypeError
        return _as_ints(value.reduction_axis), _as_ints(value.output_axis)
    except TypeError:
        raise TypeError(
            f"scale_by_shape: dimension_numbers has {value!r} at {join(names)!r}, expected "
            "optax.contrib.MuonDimensionNumbers of integers, or None for the default."
        ) from None


def _as_ints(axes: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, axes if isinstance(axes, Iterable) else (axes,)))
