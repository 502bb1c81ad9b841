"""Norms recorded over steps: by layer, against the median layer, and what is wrong."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from optax_unitscale.paths import some

__all__ = ["FLAGS", "flag", "lines_of", "median_of", "norm_ratios"]

FLAGS = ("dead", "vanished", "exploded", "non-finite")
VANISHED, EXPLODED = 1e-3, 1e3
# More slices of one array than this are no longer layers, but neurons.
MOST_SLICES = 128


def norm_ratios(
    history: Iterable[Mapping[str, Any]] | Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Each layer's gradient norm over the median layer's, step by step.

    Args:
      history: as for `plot_norms`.

    Returns:
      Arrays over the steps by layer, or by slice where axes were kept. The median is that of the
      step's finite norms above zero; where there is none, the ratio is NaN, as it is for a norm
      that is not finite. A norm of zero has ratio zero.

    Raises:
      TypeError: as `plot_norms`.
      ValueError: as `plot_norms`.

    Examples:
      >>> from optax_unitscale import norm_ratios
      >>> ratios = norm_ratios([{"a": 1.0, "b": 4.0, "c": 2.0}, {"a": 0.0, "b": 3.0, "c": None}])
      >>> {name: ratio.tolist() for name, ratio in ratios.items()}
      {'a': [0.5, 0.0], 'b': [2.0, 1.0], 'c': [1.0, nan]}
    """
    lines = lines_of("norm_ratios", history)
    median = median_of(np.array(list(lines.values())))
    return {
        name: np.where(np.isfinite(norm), norm, np.nan) / median for name, norm in lines.items()
    }


def lines_of(caller: str, history: Any) -> dict[str, np.ndarray]:
    """A float64 norm a step by layer, in natural order of their names."""
    if isinstance(history, Mapping):
        _check_names(caller, "history", history)
    elif isinstance(history, Iterable) and not hasattr(history, "shape"):
        history = list(history)
        for step, norms in enumerate(history):
            _check_names(caller, f"step {step}", norms)
    else:
        raise TypeError(
            f"{caller}: history has type {type(history).__name__}, expected a list of a dict of "
            "norms by name for each step, or one dict of arrays over the steps."
        )
    # All at once, for otherwise each norm would be a transfer of its own.
    history = jax.device_get(history)
    if not isinstance(history, Mapping):
        history = _stack(caller, history)
    lines: dict[str, np.ndarray] = {}
    for name in sorted(history, key=_natural):
        values = _floats(caller, name, history[name])
        if values.ndim == 0:
            raise ValueError(
                f"{caller}: history[{name!r}] is one number, expected one for each step. Put the "
                "dict of a single step into a list."
            )
        lines.update(_slices(name, values))
    steps = sorted({line.size for line in lines.values()})
    if steps in ([], [0]):
        raise ValueError(
            f"{caller}: there are no norms, expected at least one norm for at least one step."
        )
    if len(steps) > 1:
        raise ValueError(
            f"{caller}: history has arrays of {steps} steps, expected the same number in each. "
            "Put the dict of a single step into a list."
        )
    return lines


def median_of(norms: np.ndarray) -> np.ndarray:
    """Each step's median over the layers whose norm is finite and not zero; NaN without any."""
    counted = np.ma.masked_where(~((norms > 0) & np.isfinite(norms)), norms)
    return np.ma.filled(np.ma.median(counted, axis=0), np.nan)


def flag(norm: float, ratio: float) -> str:
    """The one of `FLAGS` that a norm deserves, given its ratio to the median; "" if none."""
    if not math.isfinite(norm):
        return "non-finite"
    if norm == 0:
        return "dead"
    return "vanished" if ratio < VANISHED else "exploded" if ratio > EXPLODED else ""


def _check_names(caller: str, where: str, norms: Any) -> None:
    if not isinstance(norms, Mapping):
        raise TypeError(
            f"{caller}: {where} has type {type(norms).__name__}, expected a dict of norms by name."
        )
    odd = [name for name in norms if not isinstance(name, str)]
    if odd:
        raise TypeError(
            f"{caller}: {where} has norms named {some(odd)}, expected strings. Take the names "
            "that gradient_norms gives, or str(name)."
        )


def _floats(caller: str, name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"{caller}: the norm of {name!r} has type {type(value).__name__}, expected a number or "
            "an array. Flatten dicts of dicts to names such as 'blocks/0/kernel'."
        ) from None


def _stack(caller: str, history: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    stacked: dict[str, np.ndarray] = {}
    first: Mapping[str, Any] = history[0] if history else {}
    for step, norms in enumerate(history):
        if norms.keys() != first.keys():
            raise ValueError(
                f"{caller}: steps 0 and {step} have different names, expected the same: only one "
                f"of the two has {some(sorted(first.keys() ^ norms.keys()))}. Pass them separately."
            )
    for name in first:
        values = [_floats(caller, name, norms[name]) for norms in history]
        shapes = list(dict.fromkeys(value.shape for value in values))
        if len(shapes) > 1:
            raise ValueError(
                f"{caller}: {name!r} has shapes {shapes} at different steps, expected one. Pass "
                "them separately."
            )
        stacked[name] = np.stack(values)
    return stacked


def _slices(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    kept = values.shape[1:]
    if math.prod(kept) > MOST_SLICES:
        values = values.reshape(len(values), -1)
        yield f"{name}[min]", values.min(axis=1)
        yield f"{name}[median]", np.median(values, axis=1)
        yield f"{name}[max]", values.max(axis=1)
        return
    for index in np.ndindex(kept):
        place = f"[{','.join(map(str, index))}]" if index else ""
        yield name + place, values[(slice(None), *index)]


def _natural(name: str) -> list[str | int]:
    # JAX sorts dicts by their characters, layer 10 before layer 2.
    return [int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+)", name))]
