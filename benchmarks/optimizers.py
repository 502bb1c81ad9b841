"""The contenders: each an Optax transformation made from a learning rate and a model's layers.

All that are SGD at heart have the same momentum; the others keep Optax's defaults.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from optax_unitscale import (
    Layer,
    Layers,
    orthogonalize,
    record_norms,
    scale_by_shape,
    unit_muon,
    unit_scale,
    unit_sgd,
)

__all__ = ["COMPARED", "CONTENDERS", "SHOWN", "TRANSFERRED", "is_ours", "make", "matrices"]

MOMENTUM = 0.9
# The fan-in of a kernel for which AdamW with the 1/width rule is AdamW.
BASE_FAN_IN = 64
# The weight decays that are tried beside Optax's default.
DECAYS = (0.01, 0.1, 1.0)


def matrices(layers: Layers) -> Callable[[Any], Any]:
    """The axes of every kernel as a matrix, those of attention and convolutions too, else None."""

    def numbers(layer: Layer) -> MuonDimensionNumbers | None:
        is_kernel = layer.kind == "kernel"
        return MuonDimensionNumbers(layer.inputs, layer.outputs) if is_kernel else None

    return lambda tree: layers.map(numbers, tree)


def _sgd(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=MOMENTUM)


def _adamw_width(rate: Any, layers: Layers) -> optax.GradientTransformation:
    """A kernel's learning rate is over its fan-in in units of `BASE_FAN_IN` (Tensor Programs V)."""
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4),
        scale_by_shape("sign", layers=layers),
        optax.masked(
            optax.scale(float(BASE_FAN_IN)),
            lambda tree: layers.map(lambda layer: layer.kind == "kernel", tree),
        ),
        optax.scale_by_learning_rate(rate),
    )


def _muon(rate: Any, layers: Layers, decay: float = 0.0) -> optax.GradientTransformation:
    """Optax's Muon, told which leaves are kernels; decay is of these."""
    return optax.contrib.muon(
        rate, weight_decay=decay, muon_weight_dimension_numbers=matrices(layers)
    )


def _muon_matched(rate: Any, layers: Layers) -> optax.GradientTransformation:
    """Optax's Muon step where `unit_muon` has its own, at the same length for every leaf."""
    momentum, row = optax.trace(MOMENTUM, nesterov=True), unit_scale(axis=-1, min_norm=1e-3)
    return optax.chain(
        optax.partition(
            {
                "kernel": optax.contrib.scale_by_muon(
                    beta=MOMENTUM, weight_dimension_numbers=matrices(layers)
                ),
                "embedding": optax.chain(unit_scale(), momentum, row),
                "vector": optax.chain(momentum, unit_scale(), optax.scale(0.1)),
            },
            lambda tree: layers.map(lambda layer: layer.kind, tree),
        ),
        scale_by_shape(layers=layers),
        optax.scale_by_learning_rate(rate),
    )


class Contender(NamedTuple):
    """An optimizer.

    Attributes:
      rate: a peak learning rate that it can learn something with.
      make: from a learning rate or its schedule, what each leaf is, and perhaps a weight decay.
      decays: weight decays to try beside the default.
      tuned: whether other rates are tried.
    """

    rate: float
    make: Callable[..., optax.GradientTransformation]
    decays: tuple[float, ...] = ()
    tuned: bool = True


CONTENDERS = {
    "sgd": Contender(0.1, lambda rate, _: _sgd(rate)),
    "clip": Contender(0.1, lambda rate, _: optax.chain(optax.clip_by_global_norm(1.0), _sgd(rate))),
    "adamw": Contender(
        0.003, lambda rate, _, decay=1e-4: optax.adamw(rate, weight_decay=decay), DECAYS
    ),
    "lion": Contender(0.001, lambda rate, _: optax.lion(rate)),
    "lamb": Contender(0.01, lambda rate, _: optax.lamb(rate)),
    "muon": Contender(0.01, _muon, DECAYS),
    "unit_scale": Contender(0.03, lambda rate, _: optax.chain(unit_scale(), _sgd(rate))),
    "unit_scale_global": Contender(
        0.1, lambda rate, _: optax.chain(unit_scale(scope="global"), _sgd(rate))
    ),
    "unit_scale_adam": Contender(
        0.003, lambda rate, _: optax.chain(unit_scale(), optax.adam(rate))
    ),
    "unit_muon": Contender(0.03, lambda rate, layers: unit_muon(rate, layers=layers)),
    "unit_muon_untuned": Contender(
        0.03, lambda rate, layers: unit_muon(rate, layers=layers), tuned=False
    ),
    "unit_muon_twice": Contender(
        0.03,
        lambda rate, layers: optax.chain(
            orthogonalize(layers=layers), unit_muon(rate, layers=layers)
        ),
    ),
    "unit_muon_decay": Contender(
        0.03,
        lambda rate, layers, decay=0.0: unit_muon(rate, layers=layers, weight_decay=decay),
        DECAYS,
    ),
    "unit_muon_keep_norm": Contender(
        0.03, lambda rate, layers: unit_muon(rate, layers=layers, keep_norm=True)
    ),
    "muon_matched": Contender(0.03, _muon_matched),
}
COMPARED = tuple(CONTENDERS)
CONTENDERS |= {
    "adam": Contender(0.003, lambda rate, _: optax.adam(rate)),
    "adamw_width": Contender(0.003, _adamw_width),
    "muon_decay_0.1": Contender(0.01, lambda rate, layers: _muon(rate, layers, 0.1)),
    "unit_muon_decay_0.1": Contender(
        0.03, lambda rate, layers: unit_muon(rate, layers=layers, weight_decay=0.1)
    ),
    "unit_sgd": Contender(0.03, lambda rate, _: unit_sgd(rate)),
}
TRANSFERRED = ("sgd", "adam", "adamw_width", "muon", "muon_decay_0.1")
TRANSFERRED += ("unit_muon", "unit_muon_decay_0.1", "unit_muon_keep_norm")
# Those that `train` shows where nobody asks for others.
SHOWN: tuple[str, ...] = ("adamw", "muon", "unit_scale", "unit_muon")


def make(
    name: str,
    learning_rate: jax.typing.ArrayLike,
    steps: int,
    layers: Layers,
    decay: float | None = None,
) -> optax.GradientTransformation:
    """A contender under the schedule that all share: linear warm-up, then cosine to zero.

    Its state also holds the norms of the gradient that came in, for `recorded_norms`.

    Args:
      name: a key of `CONTENDERS`.
      learning_rate: the schedule's peak; may be traced.
      steps: the schedule's length.
      layers: what each leaf of the model is.
      decay: one of the contender's weight decays, or None for the default.

    Returns:
      The transformation.
    """
    shape = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup_steps=max(1, steps // 20), decay_steps=max(2, steps)
    )

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # Optax's cosine mixes an integer count with floats, which strict promotion refuses.
        return jnp.asarray(learning_rate * shape(jnp.asarray(count, jnp.float32)))

    more = {} if decay is None else {"decay": decay}
    optimizer = CONTENDERS[name].make(schedule, layers, **more)
    return optax.chain(record_norms(), optimizer)


def is_ours(name: str) -> bool:
    """Whether a contender is made of this package; `muon_matched` is, but for the matrix's step."""
    return name.startswith("unit_") or name == "muon_matched"
