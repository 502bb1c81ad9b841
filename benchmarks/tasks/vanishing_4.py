"""The task `vanishing` at 4 hidden layers."""

from benchmarks.tasks import Task
from benchmarks.tasks.vanishing import load_depth

__all__ = ["load"]


def load() -> Task:
    """Reads the images."""
    # As in `vanishing`, but unit_scale is at the edge of its grid.
    return load_depth(4, {"sgd": 0.1, "clip": 0.1, "adamw": 0.003, "unit_scale": 0.3})
