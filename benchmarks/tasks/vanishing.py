"""Classifying handwritten digits through eight layers of sigmoids, in which gradients vanish.

Depths 4, 16 and 32 are tasks of their own, in files beside this one.
"""

import functools

from flax import nnx
from sklearn.datasets import load_digits

from benchmarks.models.classifiers import MLP
from benchmarks.tasks import Task
from benchmarks.tasks.shared.classification import Examples, make_image_task, split_images

WIDTH = 64


@functools.cache
def splits() -> dict[str, Examples]:
    """The 1797 images of 8 by 8 pixels that scikit-learn holds."""
    pixels, labels = load_digits(return_X_y=True)
    return split_images(pixels.reshape(-1, 8, 8) / 16, labels)


def load(depth: int = 8) -> Task:
    """Reads the images, for some number of hidden layers."""
    return make_image_task(
        splits(),
        model=lambda seed: MLP(64, WIDTH, depth, 10, nnx.sigmoid, nnx.Rngs(seed)),
        target=95.0,
        steps=3000,
        batch_size=256,
    )
