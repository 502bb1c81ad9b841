"""The contenders: each an Optax transformation made from a learning rate or its schedule.

All that are SGD at heart have the same momentum; the others keep Optax's defaults.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_unitscale import gradient_norms, unit_scale

__all__ = ["CONTENDERS", "SHOWN", "Contender", "make"]

MOMENTUM = 0.9


def _sgd(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=MOMENTUM)


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
    "muon": Contender("Muon, with Adam for what is not a matrix", 0.01, optax.contrib.muon),
    "unit_scale": Contender(
        "unit_scale per leaf, then SGD with momentum",
        0.03,
        lambda rate: optax.chain(unit_scale(), _sgd(rate)),
    ),
    "unit_scale_last": Contender(
        "momentum, then unit_scale per leaf",
        0.03,
        lambda rate: optax.chain(
            optax.trace(MOMENTUM), unit_scale(), optax.scale_by_learning_rate(rate)
        ),
    ),
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
}
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
