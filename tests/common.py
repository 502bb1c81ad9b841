"""What several test files have in common: the norms, samples, a short call, compilations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from optax_unitscale import unit_scale

__all__ = ["EMPTY", "NORMS", "compilations", "exported_for", "sample", "scaled"]

EMPTY = optax.EmptyState()
NORMS = ["l2", "rms", "l1", "linf"]
_EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _EVENTS.append(event))


def compilations() -> int:
    """How many programs this process has compiled."""
    return _EVENTS.count("/jax/core/compile/backend_compile_duration")


def scaled(tree: Any, norm: str = "l2", **options: Any) -> Any:
    """The updates of one call of `unit_scale`."""
    return unit_scale(norm, **options).update(tree, EMPTY)[0]


def exported_for(function: Callable[[Any], Any], example: Any, platform: str = "cuda") -> Any:
    """The program that JAX makes for GPU, or "tpu", to be run on CPU."""
    checks = [export.DisabledSafetyCheck.platform()]
    made = export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(example)
    return jax.jit(made.call)


def sample(shape, dtype, magnitude=1.0, seed=0):
    """Normal samples, none so near to zero that it would be subnormal."""
    rng = np.random.default_rng(seed)
    draws = rng.normal(size=(2, *shape))
    draws = np.where(np.abs(draws) < 0.01, 0.01, draws) * magnitude
    dtype = jnp.dtype(dtype)
    values = draws[0] + 1j * draws[1] if jnp.issubdtype(dtype, jnp.complexfloating) else draws[0]
    return values.astype(dtype)
