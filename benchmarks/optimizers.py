"""The contenders: each an Optax transformation made from a learning rate or its schedule.

All that are SGD at heart have the same momentum; the others keep Optax's defaults.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_unitscale import gradient_norms, scale_by_shape, unit_scale

__all__ = ["COMPARED", "CONTENDERS", "SHOWN", "TRANSFERRED", "Contender", "make"]

MOMENTUM = 0.9
# The fan-in of a kernel for which AdamW with the 1/width rule is AdamW.
BASE_FAN_IN = 64


def _sgd(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=MOMENTUM)


def _momentum_unit_scale(rate: Any, *more: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(MOMENTUM), unit_scale(), *more, optax.scale_by_learning_rate(rate)
    )


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
            _kinds,
        ),
        scale_by_shape(),
        optax.scale_by_learning_rate(rate),
    )


def _kinds(tree: Any) -> Any:
    """What each leaf is: "kernel", "embedding" or "vector"."""

    def kind(keys: Any, x: jax.Array) -> str:
        return "vector" if x.ndim < 2 else _path(keys).rpartition("/")[2]

    return jax.tree.map_with_path(kind, tree)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


def _adamw_width(rate: Any) -> optax.GradientTransformation:
    """A kernel's learning rate is over its fan-in in units of `BASE_FAN_IN` (Tensor Programs V)."""
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4),
        scale_by_shape("sign"),
        optax.masked(optax.scale(float(BASE_FAN_IN)), _kernels),
        optax.scale_by_learning_rate(rate),
    )


def _kernels(tree: Any) -> Any:
    """True at kernels, whose factor under "sign" is not 1."""
    return jax.tree.map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), tree)


def _inputs(path: str, x: jax.Array) -> tuple[int, ...]:
    """The axes of a matrix's inputs: first where attention projects to heads, else all but last."""
    projects = re.search("(query|key|value)/kernel$", path) is not None
    return tuple(range(1 if projects else max(1, x.ndim - 1))) if x.ndim else ()


def _outputs(path: str, x: jax.Array) -> tuple[int, ...]:
    """The other axes; all of a vector."""
    return tuple(range(len(_inputs(path, x)) if x.ndim > 1 else 0, x.ndim))


def _matrices(tree: Any) -> Any:
    """The axes of every kernel as a matrix, those of attention and convolutions too, else None."""

    def of_leaf(keys: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        path = _path(keys)
        if not path.endswith("kernel"):
            return None
        return optax.contrib.MuonDimensionNumbers(_inputs(path, x), _outputs(path, x))

    return jax.tree.map_with_path(of_leaf, tree)


def _vectors(tree: Any) -> Any:
    """True at biases and gains, which always move by all that a norm allows (`scale_by_shape`)."""
    return jax.tree.map(lambda x: x.ndim < 2, tree)


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
        lambda rate: optax.contrib.muon(rate, muon_weight_dimension_numbers=_matrices),
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
        0.03,
        lambda rate: optax.chain(
            *[unit_scale(axis=axis) for axis in (_outputs, _inputs)] * 3,
            optax.masked(optax.scale(0.1), _vectors),
            _sgd(rate),
        ),
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
            *(unit_scale(axis=axis) for axis in (_outputs, _inputs)),
            unit_scale(),
        ),
    ),
    "unit_scale_shape_muon": Contender(
        "unit_scale_shape_rows with Muon's orthogonal matrices for kernels",
        0.03,
        lambda rate: _by_kind(
            rate, optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices)
        ),
    ),
    "unit_scale_shape_muon_leaf": Contender(
        "unit_scale_shape_muon with unit_scale of whole embeddings",
        0.03,
        lambda rate: _by_kind(
            rate, optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices), rows=False
        ),
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
    "unit_scale_shape_muon",
)
# Those that `train` shows where nobody asks for others.
SHOWN: tuple[str, ...] = ("sgd", "clip", "adamw", "unit_scale")


def make(
    name: str, learning_rate: jax.typing.ArrayLike, steps: int
) -> optax.GradientTransformation:
    """A contender under the schedule that all share: linear warm-up, then cosine to zero.

    Its state also holds the norms of the gradient that came in, as `grad_norms`.

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
    return optax.chain(optax.snapshot("grad_norms", gradient_norms), optimizer)
