"""The task `vanishing` at 4 hidden layers."""

from benchmarks.tasks import Task
from benchmarks.tasks.vanishing import load_depth

__all__ = ["load"]


def load() -> Task:
    """Reads the images."""
    # The best of seven half-decades each, see results/cpu-2-cores/compare.
    return load_depth(4, {"sgd": 1.0, "clip": 3.0, "adamw": 0.1, "muon": 0.01, "unit_scale": 0.1})
