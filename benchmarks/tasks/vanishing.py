"""Naming handwritten digits through eight layers of sigmoids, in which gradients vanish.

Depths 4, 16 and 32 are tasks of their own, in files beside this one.
"""

import functools
from collections.abc import Mapping

from flax import nnx
from sklearn.datasets import load_digits

from benchmarks.models.mlp import MLP
from benchmarks.tasks import Task
from benchmarks.tasks.shared.classification import Images, make_task, split

__all__ = ["load", "load_depth", "splits"]

WIDTH = 64


@functools.cache
def splits() -> dict[str, Images]:
    """The 1797 images of 8 by 8 pixels that scikit-learn holds."""
    pixels, labels = load_digits(return_X_y=True)
    return split(pixels.reshape(-1, 8, 8) / 16, labels)


def load() -> Task:
    """Reads the images, for eight hidden layers."""
    # The best of seven half-decades each, see results/cpu-2-cores/compare.
    return load_depth(8, {"sgd": 0.1, "clip": 0.1, "adamw": 0.003, "muon": 0.03, "unit_scale": 0.1})


def load_depth(depth: int, learning_rates: Mapping[str, float]) -> Task:
    """Reads the images, for some number of hidden layers."""
    return make_task(
        splits(),
        model=lambda seed: MLP(64, WIDTH, depth, 10, nnx.sigmoid, nnx.Rngs(seed)),
        target=95.0,
        steps=3000,
        sweep=3000,
        batch_size=256,
        learning_rates=learning_rates,
    )
