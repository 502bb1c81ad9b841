"""The contenders: each an Optax transformation made from a learning rate and a model's layers.

All that are SGD at heart have the same momentum; the others keep Optax's defaults.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax.contrib import MuonDimensionNumbers

from optax_unitscale import record_norms, scale_by_shape, unit_scale

__all__ = [
    "COMPARED",
    "CONTENDERS",
    "ORTHOGONAL",
    "SHOWN",
    "TRANSFERRED",
    "Contender",
    "is_ours",
    "make",
]

MOMENTUM = 0.9
# The fan-in of a kernel for which AdamW with the 1/width rule is AdamW.
BASE_FAN_IN = 64


def _sgd(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=MOMENTUM)


def _momentum_unit_scale(rate: Any, *more: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(MOMENTUM), unit_scale(), *more, optax.scale_by_learning_rate(rate)
    )


def _adamw_width(rate: Any) -> optax.GradientTransformation:
    """A kernel's learning rate is over its fan-in in units of `BASE_FAN_IN` (Tensor Programs V)."""
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4),
        scale_by_shape("sign"),
        optax.masked(optax.scale(float(BASE_FAN_IN)), layers.are_kernels),
        optax.scale_by_learning_rate(rate),
    )


def _orthogonal(beta: float = 0.95) -> optax.GradientTransformation:
    """Muon's step: a kernel's momentum as the nearest orthogonal matrix, spectral norm 1."""
    return optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=layers.matrices)


def _by_kind(
    rate: Any, *kernel: optax.GradientTransformation, rows: bool = True
) -> optax.GradientTransformation:
    """Momentum and `unit_scale`, each row of an embedding by itself; a tenth for vectors; shapes.

    Args:
      rate: the learning rate.
      *kernel: what kernels get in place of momentum and `unit_scale`.
      rows: False for `unit_scale` of a whole embedding.
    """
    momentum = optax.trace(MOMENTUM)
    return optax.chain(
        optax.partition(
            {
                "kernel": optax.chain(*(kernel or (momentum, unit_scale()))),
                "embedding": optax.chain(momentum, unit_scale(axis=-1 if rows else None)),
                "vector": optax.chain(momentum, unit_scale(), optax.scale(0.1)),
            },
            layers.kinds,
        ),
        scale_by_shape(dimension_numbers=layers.matrices),
        optax.scale_by_learning_rate(rate),
    )


def _spectral(rate: Any) -> optax.GradientTransformation:
    """As `_by_kind` with orthogonal kernels, but momentum comes last."""
    return optax.chain(
        unit_scale(axis=layers.rows),
        optax.partition(
            {
                "kernel": _orthogonal(beta=0.0),
                "embedding": optax.identity(),
                "vector": optax.scale(0.1),
            },
            layers.kinds,
        ),
        scale_by_shape(dimension_numbers=layers.matrices),
        _sgd(rate),
    )


class Contender(NamedTuple):
    """An optimizer.

    Attributes:
      summary: what it is, in a few words.
      rate: a peak learning rate that it can learn something with.
      make: from a learning rate or its schedule.
    """

    summary: str
    rate: float
    make: Callable[[Any], optax.GradientTransformation]


CONTENDERS = {
    "sgd": Contender("SGD with momentum", 0.1, _sgd),
    "clip": Contender(
        "clip_by_global_norm(1), then SGD with momentum",
        0.1,
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), _sgd(rate)),
    ),
    "adamw": Contender("AdamW", 0.003, optax.adamw),
    "lion": Contender("Lion", 0.001, optax.lion),
    "lamb": Contender("LAMB", 0.01, optax.lamb),
    "muon": Contender(
        "Muon for kernels, Adam for the rest",
        0.01,
        lambda rate: optax.contrib.muon(rate, muon_weight_dimension_numbers=layers.matrices),
    ),
    "unit_scale": Contender(
        "unit_scale per leaf, then SGD with momentum",
        0.03,
        lambda rate: optax.chain(unit_scale(), _sgd(rate)),
    ),
    "unit_scale_last": Contender("momentum, then unit_scale per leaf", 0.03, _momentum_unit_scale),
    "unit_scale_global": Contender(
        "unit_scale of the whole gradient, then SGD with momentum",
        0.1,
        lambda rate: optax.chain(unit_scale(scope="global"), _sgd(rate)),
    ),
    "unit_scale_rms": Contender(
        "unit_scale to rms 1 per leaf, then SGD with momentum",
        0.0003,
        lambda rate: optax.chain(unit_scale("rms"), _sgd(rate)),
    ),
    "unit_scale_adam": Contender(
        "unit_scale per leaf, then Adam",
        0.003,
        lambda rate: optax.chain(unit_scale(), optax.adam(rate)),
    ),
    "unit_scale_sinkhorn": Contender(
        "unit_scale of rows and columns in turn (SinkGD), a tenth of the rate for vectors, then "
        "SGD with momentum",
        0.01,
        lambda rate: optax.chain(
            *[unit_scale(axis=axis) for axis in (layers.outputs, layers.inputs)] * 3,
            optax.masked(optax.scale(0.1), layers.are_vectors),
            _sgd(rate),
        ),
    ),
    "unit_scale_muon": Contender(
        "unit_scale, Muon's orthogonal momentum for kernels, scale_by_shape; for the rest momentum "
        "before unit_scale, each row of an embedding by itself, a tenth of the rate for vectors",
        0.03,
        lambda rate: _by_kind(rate, unit_scale(), _orthogonal()),
    ),
    "unit_scale_spectral": Contender(
        "unit_scale, Muon's orthogonal matrices for kernels, scale_by_shape, then SGD with "
        "momentum; rows and vectors as in unit_scale_muon",
        0.01,
        _spectral,
    ),
}
COMPARED = tuple(CONTENDERS)
CONTENDERS |= {
    "adam": Contender("Adam", 0.003, optax.adam),
    "adamw_width": Contender("AdamW, a kernel's rate over its fan-in", 0.003, _adamw_width),
    "unit_scale_shape": Contender(
        "momentum, unit_scale per leaf, scale_by_shape",
        0.03,
        lambda rate: _momentum_unit_scale(rate, scale_by_shape()),
    ),
    "unit_scale_shape_vectors": Contender(
        "unit_scale_shape with a tenth of the rate for vectors",
        0.1,
        lambda rate: _by_kind(rate, rows=False),
    ),
    "unit_scale_shape_rows": Contender(
        "unit_scale_shape_vectors with unit_scale of each row of an embedding",
        0.1,
        _by_kind,
    ),
    "unit_scale_shape_sinkhorn": Contender(
        "unit_scale_shape_rows with unit_scale of a kernel's rows and columns before",
        0.1,
        lambda rate: _by_kind(
            rate,
            optax.trace(MOMENTUM),
            *(unit_scale(axis=axis) for axis in (layers.outputs, layers.inputs)),
            unit_scale(),
        ),
    ),
    "unit_scale_muon_leaf": Contender(
        "unit_scale_muon with unit_scale of whole embeddings",
        0.03,
        lambda rate: _by_kind(rate, unit_scale(), _orthogonal(), rows=False),
    ),
}
TRANSFERRED = (
    "sgd",
    "adam",
    "adamw_width",
    "muon",
    "unit_scale_last",
    "unit_scale_shape",
    "unit_scale_shape_rows",
    "unit_scale_muon",
)
# Those with Muon's orthogonal matrices.
ORTHOGONAL = ("muon", "unit_scale_muon", "unit_scale_muon_leaf", "unit_scale_spectral")
# Those that `train` shows where nobody asks for others.
SHOWN: tuple[str, ...] = ("sgd", "clip", "adamw", "unit_scale")


def make(
    name: str, learning_rate: jax.typing.ArrayLike, steps: int
) -> optax.GradientTransformation:
    """A contender under the schedule that all share: linear warm-up, then cosine to zero.

    Its state also holds the norms of the gradient that came in, for `recorded_norms`.

    Args:
      name: a key of `CONTENDERS`.
      learning_rate: the schedule's peak; may be traced.
      steps: the schedule's length.

    Returns:
      The transformation.
    """
    shape = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup_steps=max(1, steps // 20), decay_steps=max(2, steps)
    )

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # Optax's cosine mixes an integer count with floats, which strict promotion refuses.
        return jnp.asarray(learning_rate * shape(jnp.asarray(count, jnp.float32)))

    optimizer = CONTENDERS[name].make(schedule)
    return optax.chain(record_norms(), optimizer)


def is_ours(name: str) -> bool:
    """Whether a contender has `unit_scale` in it."""
    return name.startswith("unit_scale")
