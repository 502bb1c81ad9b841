"""Naming handwritten digits read seven pixels at a time, by a network whose gradients explode.

Every one of the 112 steps of the recurrence can double a gradient.
"""

from flax import nnx

from benchmarks.classification import make_task
from benchmarks.models.rnn import RNN
from benchmarks.tasks import Task
from benchmarks.tasks.image_classification import splits

__all__ = ["load"]


def load() -> Task:
    """Reads the images of the task `image_classification`."""
    return make_task(
        splits(),
        lambda seed: RNN(7, 64, 2.0, 10, nnx.Rngs(seed)),
        target=60.0,
        steps=1000,
        batch_size=64,
        learning_rates={"sgd": 0.03, "clip": 0.03, "adamw": 0.003, "unit_scale": 0.03},
    )
