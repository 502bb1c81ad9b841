"""Classifying handwritten digits read seven pixels at a time, by a network whose gradients explode.

The image is a sequence of 112 steps, each of which can make a gradient larger by `GAIN`.
"""

from flax import nnx

from benchmarks.models.classifiers import RNN
from benchmarks.tasks import Task
from benchmarks.tasks.image_classification import splits
from benchmarks.tasks.shared.classification import make_image_task

PIXELS = 7
WIDTH = 64
GAIN = 1.7


def load() -> Task:
    """Reads the images of the task `image_classification`."""
    return make_image_task(
        splits(),
        model=lambda seed: RNN(PIXELS, WIDTH, GAIN, 10, nnx.Rngs(seed)),
        target=50.0,
        steps=1000,
        batch_size=64,
    )
