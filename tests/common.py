"""What several test files have in common: the norms, samples, a short call, compilations."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import export

from optax_unitscale import Kernel, Layer, layers_of, scale_by_shape, unit_scale
from optax_unitscale.norms import SMALL

__all__ = [
    "EMPTY",
    "LARGE",
    "NORMS",
    "check_group",
    "compilations",
    "every_norm",
    "exported_for",
    "factors",
    "line_of",
    "program",
    "readings_of",
    "said",
    "sample",
    "scaled",
    "shaped",
    "shapes",
    "short",
]

EMPTY = optax.EmptyState()
NORMS = ["l2", "rms", "l1", "linf"]
# The shape of a leaf that takes the way of large ones on CPU; the tests' others are small.
LARGE = (SMALL // 64 + 1, 64)
_EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _EVENTS.append(event))


def compilations() -> int:
    """How many programs this process has compiled."""
    return _EVENTS.count("/jax/core/compile/backend_compile_duration")


def scaled(tree: Any, norm: str = "l2", **options: Any) -> Any:
    """The updates of one call of `unit_scale`."""
    return unit_scale(norm, **options).update(tree, EMPTY)[0]


def every_norm(tree: Any, **options: Any) -> dict[str, Any]:
    """The updates by each norm, to be compiled together."""
    return {norm: scaled(tree, norm, **options) for norm in NORMS}


def factors(tree: Any, *args: Any, **options: Any) -> dict[str, float]:
    """What each leaf was multiplied by, by name."""
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), tree)
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(shaped(ones, *args, **options)):
        assert np.ptp(np.asarray(x)) == 0
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name.removesuffix("/value")] = float(np.asarray(x).ravel()[0])
    return found


def shaped(tree: Any, rule: str = "spectral", **options: Any) -> Any:
    """The updates of one call of `scale_by_shape`."""
    return scale_by_shape(rule, **options).update(tree, EMPTY)[0]


def shapes(**leaves: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Ones, by name."""
    return {name: np.ones(shape, np.float32) for name, shape in leaves.items()}


def exported_for(function: Callable[[Any], Any], example: Any, platform: str = "cuda") -> Any:
    """The program that JAX makes for GPU, or "tpu", to be run on CPU."""
    checks = [export.DisabledSafetyCheck.platform()]
    made = export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(example)
    return jax.jit(made.call)


def program(function: Callable[[Any], Any], example: Any, platform: str) -> Any:
    """The program for "cpu", or that for "cuda" or "tpu" to be run on CPU."""
    return jax.jit(function) if platform == "cpu" else exported_for(function, example, platform)


def sample(shape: Any, dtype: Any = "float32", magnitude: float = 1.0, seed: int = 0) -> Any:
    """Normal samples, none so near to zero that it would be subnormal."""
    rng = np.random.default_rng(seed)
    draws = rng.normal(size=(2, *shape))
    draws = np.where(np.abs(draws) < 0.01, 0.01, draws) * magnitude
    dtype = jnp.dtype(dtype)
    values = draws[0] + 1j * draws[1] if jnp.issubdtype(dtype, jnp.complexfloating) else draws[0]
    return values.astype(dtype)


def said(*args: Any, **options: Any) -> dict[str, str]:
    """What leaves are that are not plain vectors, as `short` writes it."""
    found = {name: short(layer) for name, layer in layers_of(*args, **options).items()}
    return {name: kind for name, kind in found.items() if kind != "vector"}


def short(layer: Layer) -> str:
    """Such as "0 > 1 2", with batch axes in brackets and blocks after a star."""
    inputs, outputs, batch = (" ".join(map(str, axes)) for axes in layer[1:4])
    text = f"{inputs} > {outputs}" if layer.kind == "kernel" else layer.kind
    return text + f" [{batch}]" * bool(batch) + f" *{layer.blocks}" * (layer.blocks > 1)


def line_of(error: pytest.ExceptionInfo[ValueError]) -> str:
    """The line that an error says to write."""
    found = re.search(r"layers_of\(.*\)", str(error.value))
    assert found
    return found[0]


def readings_of(error: pytest.ExceptionInfo[ValueError]) -> list[dict[str, Any]]:
    """What an error says that leaves can be, as overrides."""
    lines = re.findall(r"^  (\".*),  # .", str(error.value), re.MULTILINE)
    return [eval(f"{{{line}}}", {"Kernel": Kernel}) for line in lines]


def check_group(
    results: Sequence[Any], gradients: Sequence[np.ndarray], norm: str, summed: int = 0
) -> None:
    """Unit norm and true quotients, within a few units of the leaves' precision.

    `summed` is how many units of float32 more the sum of the squares may be off: CPU adds one
    element after the other in the programs for GPU, which has a tree, and in sums of columns.
    """
    sum_error = summed * 2.0**-23
    eps = max(oracle.epsilon(g.dtype) for g in gradients)
    results = [np.asarray(r) for r in results]
    # Half a unit for each rounding of an element, which for the worst of signs all add up; two
    # more for the sum, its root and its reciprocal.
    assert abs(oracle.norm_of(results, norm) - 1) < 4 * eps + sum_error
    for result, gradient, quotient in zip(
        results, gradients, oracle.unit(gradients, norm), strict=True
    ):
        assert result.dtype == gradient.dtype
        assert result.shape == gradient.shape
        units = 4 * oracle.epsilon(gradient.dtype) + sum_error
        tiny = float(jnp.finfo(gradient.dtype).tiny)
        wide = result.astype(np.complex128 if np.iscomplexobj(result) else np.float64)
        assert (np.abs(wide - quotient) <= units * np.abs(quotient) + tiny).all()
