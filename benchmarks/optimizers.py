"""The contenders: each an Optax transformation made from a learning-rate schedule.

`sgd`, `clip` and `unit_scale` are the same SGD with the same momentum; the latter two first change
the gradient, `clip` as a whole and `unit_scale` per leaf. `adamw` keeps Optax's defaults.
"""

import jax.numpy as jnp
import optax

from optax_unitscale import gradient_norms, unit_scale

__all__ = ["OPTIMIZERS", "make"]

MOMENTUM = 0.9

OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(rate, momentum=MOMENTUM),
    "clip": lambda rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=MOMENTUM)
    ),
    "adamw": lambda rate: optax.adamw(rate),
    "unit_scale": lambda rate: optax.chain(unit_scale(), optax.sgd(rate, momentum=MOMENTUM)),
}


def make(name: str, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """A contender under the schedule that all share: linear warm-up, then cosine to zero.

    Its state also holds the norms of the gradient that came in, as `grad_norms`.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=max(1, steps // 20), decay_steps=max(2, steps)
    )
    # Optax's cosine mixes an integer count with floats, which strict promotion refuses.
    optimizer = OPTIMIZERS[name](lambda count: schedule(jnp.asarray(count, jnp.float32)))
    return optax.chain(optax.snapshot("grad_norms", gradient_norms), optimizer)
