"""The task `vanishing` at 16 hidden layers."""

from benchmarks.tasks import Task
from benchmarks.tasks.vanishing import load_depth

__all__ = ["load"]


def load() -> Task:
    """Reads the images."""
    # The best of seven half-decades each, see results/cpu-2-cores/compare; neither sgd nor
    # adamw learns at any.
    return load_depth(
        16, {"sgd": 0.1, "clip": 0.1, "adamw": 0.003, "muon": 0.03, "unit_scale": 0.03}
    )
