"""The training problem that PyTorch, TensorFlow and JAX solve alike: NumPy only."""

import itertools
from typing import Any

import numpy as np

__all__ = ["CHECKPOINTS", "LEARNING_RATES", "NAMES", "STEPS", "initial", "save"]

STEPS = 200
# The numbers of steps after which the parameters are recorded.
CHECKPOINTS = (100, 200)
NAMES = tuple(f"{kind}{i}" for i in range(3) for kind in ("kernel", "bias"))
# Constant, as in the source; small enough that 200 steps of known length do not yet bounce.
LEARNING_RATES = {"leaf": 0.02, "global": 0.05}


def initial() -> dict[str, np.ndarray]:
    """Weights of a 10-32-16-5 tanh classifier and mini-batches labelled by a random teacher."""
    rng = np.random.default_rng(20261123)
    widths = (10, 32, 16, 5)
    arrays: dict[str, np.ndarray] = {
        "inputs": rng.normal(size=(STEPS, 8, widths[0])).astype(np.float32)
    }
    teacher = rng.normal(size=(widths[0], widths[-1]))
    arrays["labels"] = np.argmax(np.tanh(arrays["inputs"]) @ teacher, axis=-1)
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        arrays[f"kernel{i}"] = rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
        arrays[f"bias{i}"] = np.zeros(fan_out)
    return arrays


def save(path: str, version: str, records: dict[str, Any]) -> None:
    """Writes the problem and what a framework made of it."""
    settings = {f"{scope}_learning_rate": rate for scope, rate in LEARNING_RATES.items()}
    np.savez_compressed(
        path, version=version, checkpoints=CHECKPOINTS, **settings, **initial(), **records
    )
