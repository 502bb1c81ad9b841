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

Tree = Callable[[Any], Any]


def _kinds(layers: Layers) -> Tree:
    return lambda tree: layers.map(lambda layer: layer.kind, tree)


def _are(kind: str, layers: Layers) -> Tree:
    return lambda tree: layers.map(lambda layer: layer.kind == kind, tree)


def _matrices(layers: Layers) -> Tree:
    """The axes of every kernel as a matrix, those of attention and convolutions too, else None."""

    def numbers(layer: Layer) -> MuonDimensionNumbers | None:
        is_kernel = layer.kind == "kernel"
        return MuonDimensionNumbers(layer.inputs, layer.outputs) if is_kernel else None

    return lambda tree: layers.map(numbers, tree)


def _rows(layers: Layers) -> Callable[[str, Any], Any]:
    """The axis of each row of an embedding, all axes of anything else."""
    return lambda path, x: -1 if layers[path].kind == "embedding" else None


def _sgd(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=MOMENTUM)


def _momentum_unit_scale(rate: Any, *more: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(MOMENTUM), unit_scale(), *more, optax.scale_by_learning_rate(rate)
    )


def _adamw_width(rate: Any, layers: Layers) -> optax.GradientTransformation:
    """A kernel's learning rate is over its fan-in in units of `BASE_FAN_IN` (Tensor Programs V)."""
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4),
        scale_by_shape("sign", layers=layers),
        optax.masked(optax.scale(float(BASE_FAN_IN)), _are("kernel", layers)),
        optax.scale_by_learning_rate(rate),
    )


def _orthogonal(layers: Layers, beta: float = 0.95) -> optax.GradientTransformation:
    """Optax's Muon step: a kernel's momentum as the nearest orthogonal matrix, spectral norm 1."""
    return optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=_matrices(layers))


def _by_kind(
    rate: Any, layers: Layers, *kernel: optax.GradientTransformation, rows: bool = True
) -> optax.GradientTransformation:
    """Momentum and `unit_scale`, each row of an embedding by itself; a tenth for vectors; shapes.

    Args:
      rate: the learning rate.
      layers: what each leaf is.
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
            _kinds(layers),
        ),
        scale_by_shape(layers=layers),
        optax.scale_by_learning_rate(rate),
    )


def _spectral(rate: Any, layers: Layers) -> optax.GradientTransformation:
    """As `_by_kind` with orthogonal kernels, but momentum comes last."""
    return optax.chain(
        unit_scale(axis=_rows(layers)),
        optax.partition(
            {
                "kernel": _orthogonal(layers, beta=0.0),
                "embedding": optax.identity(),
                "vector": optax.scale(0.1),
            },
            _kinds(layers),
        ),
        scale_by_shape(layers=layers),
        _sgd(rate),
    )


def _sinkhorn(layers: Layers) -> list[optax.GradientTransformation]:
    """Columns, then rows of kernels to unit norm; other leaves as a whole, twice."""
    outputs = unit_scale(axis=lambda path, x: layers[path].outputs)
    inputs = unit_scale(axis=lambda path, x: layers[path].inputs or None)
    return [outputs, inputs]


class Contender(NamedTuple):
    """An optimizer.

    Attributes:
      summary: what it is, in a few words.
      rate: a peak learning rate that it can learn something with.
      make: from a learning rate or its schedule, and what each leaf is.
    """

    summary: str
    rate: float
    make: Callable[[Any, Layers], optax.GradientTransformation]


CONTENDERS = {
    "sgd": Contender("SGD with momentum", 0.1, lambda rate, _: _sgd(rate)),
    "clip": Contender(
        "clip_by_global_norm(1), then SGD with momentum",
        0.1,
        lambda rate, _: optax.chain(optax.clip_by_global_norm(1.0), _sgd(rate)),
    ),
    "adamw": Contender("AdamW", 0.003, lambda rate, _: optax.adamw(rate)),
    "lion": Contender("Lion", 0.001, lambda rate, _: optax.lion(rate)),
    "lamb": Contender("LAMB", 0.01, lambda rate, _: optax.lamb(rate)),
    "muon": Contender(
        "Muon for kernels, Adam for the rest",
        0.01,
        lambda rate, layers: optax.contrib.muon(
            rate, muon_weight_dimension_numbers=_matrices(layers)
        ),
    ),
    "unit_scale": Contender(
        "unit_scale per leaf, then SGD with momentum",
        0.03,
        lambda rate, _: optax.chain(unit_scale(), _sgd(rate)),
    ),
    "unit_scale_last": Contender(
        "momentum, then unit_scale per leaf", 0.03, lambda rate, _: _momentum_unit_scale(rate)
    ),
    "unit_scale_global": Contender(
        "unit_scale of the whole gradient, then SGD with momentum",
        0.1,
        lambda rate, _: optax.chain(unit_scale(scope="global"), _sgd(rate)),
    ),
    "unit_scale_rms": Contender(
        "unit_scale to rms 1 per leaf, then SGD with momentum",
        0.0003,
        lambda rate, _: optax.chain(unit_scale("rms"), _sgd(rate)),
    ),
    "unit_scale_adam": Contender(
        "unit_scale per leaf, then Adam",
        0.003,
        lambda rate, _: optax.chain(unit_scale(), optax.adam(rate)),
    ),
    "unit_scale_sinkhorn": Contender(
        "unit_scale of rows and columns in turn (SinkGD), a tenth of the rate for vectors, then "
        "SGD with momentum",
        0.01,
        lambda rate, layers: optax.chain(
            *_sinkhorn(layers) * 3,
            optax.masked(optax.scale(0.1), _are("vector", layers)),
            _sgd(rate),
        ),
    ),
    "unit_scale_muon": Contender(
        "unit_scale, Muon's orthogonal momentum for kernels, scale_by_shape; for the rest momentum "
        "before unit_scale, each row of an embedding by itself, a tenth of the rate for vectors",
        0.03,
        lambda rate, layers: _by_kind(rate, layers, unit_scale(), _orthogonal(layers)),
    ),
    "unit_scale_spectral": Contender(
        "unit_scale, Muon's orthogonal matrices for kernels, scale_by_shape, then SGD with "
        "momentum; rows and vectors as in unit_scale_muon",
        0.01,
        _spectral,
    ),
    "unit_muon": Contender("unit_muon", 0.03, lambda rate, layers: unit_muon(rate, layers=layers)),
    "unit_muon_twice": Contender(
        "orthogonalize, then unit_muon",
        0.03,
        lambda rate, layers: optax.chain(
            orthogonalize(layers=layers), unit_muon(rate, layers=layers)
        ),
    ),
}
COMPARED = tuple(CONTENDERS)
CONTENDERS |= {
    "adam": Contender("Adam", 0.003, lambda rate, _: optax.adam(rate)),
    "adamw_width": Contender("AdamW, a kernel's rate over its fan-in", 0.003, _adamw_width),
    "unit_scale_shape": Contender(
        "momentum, unit_scale per leaf, scale_by_shape",
        0.03,
        lambda rate, layers: _momentum_unit_scale(rate, scale_by_shape(layers=layers)),
    ),
    "unit_scale_shape_vectors": Contender(
        "unit_scale_shape with a tenth of the rate for vectors",
        0.1,
        lambda rate, layers: _by_kind(rate, layers, rows=False),
    ),
    "unit_scale_shape_rows": Contender(
        "unit_scale_shape_vectors with unit_scale of each row of an embedding",
        0.1,
        _by_kind,
    ),
    "unit_scale_shape_sinkhorn": Contender(
        "unit_scale_shape_rows with unit_scale of a kernel's rows and columns before",
        0.1,
        lambda rate, layers: _by_kind(
            rate, layers, optax.trace(MOMENTUM), *_sinkhorn(layers), unit_scale()
        ),
    ),
    "unit_scale_muon_leaf": Contender(
        "unit_scale_muon with unit_scale of whole embeddings",
        0.03,
        lambda rate, layers: _by_kind(rate, layers, unit_scale(), _orthogonal(layers), rows=False),
    ),
    "unit_sgd": Contender("unit_sgd", 0.03, lambda rate, _: unit_sgd(rate)),
    "unit_muon_keep_norm": Contender(
        "unit_muon, kernels keep their norm",
        0.03,
        lambda rate, layers: unit_muon(rate, layers=layers, keep_norm=True),
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
ORTHOGONAL = (
    "muon",
    "unit_scale_muon",
    "unit_scale_muon_leaf",
    "unit_scale_spectral",
    "unit_muon",
    "unit_muon_twice",
    "unit_muon_keep_norm",
)
# Those that `train` shows where nobody asks for others.
SHOWN: tuple[str, ...] = ("adamw", "muon", "unit_scale", "unit_muon")


def make(
    name: str, learning_rate: jax.typing.ArrayLike, steps: int, layers: Layers
) -> optax.GradientTransformation:
    """A contender under the schedule that all share: linear warm-up, then cosine to zero.

    Its state also holds the norms of the gradient that came in, for `recorded_norms`.

    Args:
      name: a key of `CONTENDERS`.
      learning_rate: the schedule's peak; may be traced.
      steps: the schedule's length.
      layers: what each leaf of the model is.

    Returns:
      The transformation.
    """
    shape = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup_steps=max(1, steps // 20), decay_steps=max(2, steps)
    )

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # Optax's cosine mixes an integer count with floats, which strict promotion refuses.
        return jnp.asarray(learning_rate * shape(jnp.asarray(count, jnp.float32)))

    optimizer = CONTENDERS[name].make(schedule, layers)
    return optax.chain(record_norms(), optimizer)


def is_ours(name: str) -> bool:
    """Whether a contender is made of this package."""
    return name.startswith("unit_")
