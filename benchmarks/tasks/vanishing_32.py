"""The task `vanishing` at 32 hidden layers."""

from benchmarks.tasks import Task
from benchmarks.tasks.vanishing import load_depth

__all__ = ["load"]


def load() -> Task:
    """Reads the images."""
    # The best of seven half-decades each, see results/cpu-2-cores/compare; none of the four
    # gets far at any.
    return load_depth(
        32, {"sgd": 0.1, "clip": 0.1, "adamw": 0.003, "muon": 0.01, "unit_scale": 0.03}
    )
