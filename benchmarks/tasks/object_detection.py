"""Finding trees in aerial photographs: four with hand-drawn boxes, from the package deepforest.

Two are trained on, in tiles; of the other two, whole, one validates and one tests.
"""

import functools
import io
import xml.etree.ElementTree
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt

from benchmarks import data
from benchmarks.models.detector import STRIDE, Detector
from benchmarks.tasks import Task
from benchmarks.tasks.shared.detection import (
    SYMMETRIES,
    average_precision,
    cut,
    decode,
    encode,
    turn,
)

TILE = 128
WIDTH = 32
# Of a photograph that was trained on, to evaluate: pixels, along either axis.
PART = 400
# From Yellowstone, Florida and California.
NAMES = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop"),
    "validation": ("OSBS_029",),
    "test": ("SOAP_061",),
}
LEAST_SCORE = 0.01


class Photograph(NamedTuple):
    """Colours from 0 to 1, (height, width, 3), and boxes in pixels, (boxes, 4)."""

    pixels: np.ndarray
    boxes: np.ndarray


class Tiles(NamedTuple):
    """A batch: pixels, and what the detector should say of them."""

    pixels: np.ndarray
    heat: np.ndarray
    boxes: np.ndarray


@functools.cache
def splits() -> dict[str, list[Photograph]]:
    """The photographs."""
    sha256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
    with data.archive("deepforest", "2.1.0", sha256) as archive:
        return {split: [_read(archive, name) for name in NAMES[split]] for split in NAMES}


def _read(archive: zipfile.ZipFile, name: str) -> Photograph:
    pixels = plt.imread(io.BytesIO(archive.read(f"deepforest/data/{name}.png")))
    # A convolution of stride 2 is centred otherwise on an odd number of pixels.
    height, width = (size // STRIDE * STRIDE for size in pixels.shape[:2])
    root = xml.etree.ElementTree.fromstring(archive.read(f"deepforest/data/{name}.xml"))
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = [[float(box.findtext(side, "")) for side in sides] for box in root.iter("bndbox")]
    return Photograph(
        pixels[:height, :width].astype(np.float32), cut(np.array(boxes), 0, 0, width, height)
    )


def load() -> Task:
    """Reads the photographs."""
    photographs = [photograph for split in splits().values() for photograph in split]
    return Task(
        metric="AP50 [%]",
        higher_is_better=True,
        target=15.0,
        fingerprint=data.fingerprint(array for photograph in photographs for array in photograph),
        steps=800,
        batch_size=8,
        model=lambda seed: Detector(WIDTH, nnx.Rngs(seed)),
        batch=_batch,
        loss=_loss,
        evaluate=_evaluate,
        sample=_sample,
    )


def _batch(seed: int, step: int, batch_size: int) -> Tiles:
    """Tiles around random trees, turned, mirrored and recoloured at random."""
    tiles = [_tile(np.random.default_rng((seed, step, row))) for row in range(batch_size)]
    return Tiles(*map(np.stack, zip(*tiles, strict=True)))


def _tile(rng: np.random.Generator) -> Tiles:
    train = splits()["train"]
    counts = np.array([len(photograph.boxes) for photograph in train])
    pixels, boxes = train[rng.choice(len(train), p=counts / counts.sum())]
    tree = boxes[rng.integers(len(boxes))]
    middle = (tree[:2] + tree[2:]) / 2
    height, width = pixels.shape[:2]
    left, top = np.clip(middle - rng.uniform(0, TILE, 2), 0, (width - TILE, height - TILE)).astype(
        int
    )
    tile, boxes = turn(
        pixels[top : top + TILE, left : left + TILE],
        cut(boxes, left, top, TILE, TILE),
        int(rng.integers(SYMMETRIES)),
    )
    # Each photograph has its own light.
    gain, offset = rng.uniform(0.7, 1.3, 3), rng.uniform(-0.15, 0.15, 3)
    return Tiles((tile * gain + offset).astype(np.float32), *encode(boxes, TILE // STRIDE))


def _loss(model: Detector, batch: Tiles) -> jax.Array:
    """Cross-entropy of the centres in nats plus absolute error of the boxes, per unit of heat."""
    logits, boxes = model(jnp.asarray(batch.pixels))
    centres = optax.sigmoid_binary_cross_entropy(logits, batch.heat)
    # Far from any centre there is no box to describe.
    near = jnp.where(batch.heat > 0.1, batch.heat, 0.0)
    errors = jnp.abs(boxes - batch.boxes).sum(-1)
    return centres.sum() / batch.heat.sum() + (near * errors).sum() / near.sum()


@nnx.jit
def _describe(model: Detector, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits, boxes = model(pixels[None])
    return nnx.sigmoid(logits[0]), boxes[0]


def _find(model: Detector, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes in a photograph and their scores, best first."""
    heat, boxes = _describe(model, jnp.asarray(pixels))
    return decode(np.asarray(heat), np.asarray(boxes), LEAST_SCORE)


def _evaluate(model: Detector, split: str) -> float:
    """AP50 over whole photographs; for "train", over a part of one as large as the others."""
    photographs = splits()[split]
    if split == "train":
        # The lower right corner.
        pixels, boxes = photographs[1]
        height, width = pixels.shape[:2]
        boxes = cut(boxes, width - PART, height - PART, PART, PART)
        photographs = [Photograph(pixels[-PART:, -PART:], boxes)]
    found = [_find(model, photograph.pixels) for photograph in photographs]
    return average_precision([photograph.boxes for photograph in photographs], found)


def _sample(model: Detector, seed: int) -> str:
    """How well trees are found in the photographs that were not trained on."""
    del seed
    parts = ("validation", "test")
    counts = {part: sum(len(photograph.boxes) for photograph in splits()[part]) for part in parts}
    return "\n".join(
        f"{n} trees in {x}: AP50 {_evaluate(model, x):.1f} %" for x, n in counts.items()
    )
