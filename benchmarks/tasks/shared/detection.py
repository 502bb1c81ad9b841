"""Boxes in tiles of a photograph, as targets of a detector and back, and their AP50.

Boxes are rows of (left, top, right, bottom) in pixels.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.models.detector import STRIDE

SYMMETRIES = 8
# A tree of which a tile shows less cannot be recognised as one.
LEAST_VISIBLE = 0.4


def cut(boxes: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    """The boxes that a tile of a photograph shows, clipped to it and seen from its corner."""
    clipped = np.clip(boxes, [left, top, left, top], [left + width, top + height] * 2)
    visible = _area(clipped) >= LEAST_VISIBLE * _area(boxes)
    return clipped[visible] - np.array([left, top, left, top], boxes.dtype)


def turn(image: np.ndarray, boxes: np.ndarray, how: int) -> tuple[np.ndarray, np.ndarray]:
    """One of the eight symmetries of a square image: bits mirror x, mirror y, swap x and y."""
    size = image.shape[0]
    if how & 1:
        image, boxes = image[:, ::-1], boxes * [-1, 1, -1, 1] + [size, 0, size, 0]
        boxes = boxes[:, [2, 1, 0, 3]]
    if how & 2:
        image, boxes = image[::-1], boxes * [1, -1, 1, -1] + [0, size, 0, size]
        boxes = boxes[:, [0, 3, 2, 1]]
    if how & 4:
        image, boxes = image.swapaxes(0, 1), boxes[:, [1, 0, 3, 2]]
    return image, boxes


def encode(boxes: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """What a detector should say of a square image: (cells, cells) and (cells, cells, 4).

    The first is 1 in the cell of a centre and falls off around it as a Gaussian with a seventh of
    the box's sides for standard deviations; the second describes the box of the greatest Gaussian.
    """
    if not len(boxes):
        return np.zeros((cells, cells), np.float32), np.zeros((cells, cells, 4), np.float32)
    middles = np.arange(cells) + 0.5
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / STRIDE
    sides = (boxes[:, 2:] - boxes[:, :2]) / STRIDE
    # Axes: box, row, column, (x, y).
    grid = np.stack(np.broadcast_arrays(middles[None, :], middles[:, None]), -1)[None]
    offsets = centres[:, None, None] - grid
    distances = np.where(np.floor(centres)[:, None, None] == grid - 0.5, 0.0, offsets)
    distances = distances / (sides[:, None, None] / 7)
    heat = np.exp(-(distances**2).sum(-1) / 2)
    nearest = heat.argmax(0)[None, ..., None]
    described = np.concatenate(
        [offsets, np.broadcast_to(np.log(sides)[:, None, None], offsets.shape)], -1
    )
    found = np.take_along_axis(described, nearest, 0)[0]
    return heat.max(0).astype(np.float32), found.astype(np.float32)


def decode(heat: np.ndarray, described: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """The boxes and scores, best first, of the cells that no neighbour exceeds.

    `heat`, (rows, columns), is how likely a box is centred in each cell, and counts from `least`
    on; `described`, (rows, columns, 4), are those boxes as `encode` describes them.
    """
    around = np.lib.stride_tricks.sliding_window_view(np.pad(heat, 1), (3, 3))
    highest = around.max((-2, -1))
    rows, columns = np.nonzero((heat >= highest) & (heat >= least))
    order = np.argsort(-heat[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    found = described[rows, columns]
    centres = np.stack([columns, rows], -1) + 0.5 + found[:, :2]
    half = np.exp(found[:, 2:]) / 2
    boxes = np.concatenate([centres - half, centres + half], -1) * STRIDE
    return boxes, heat[rows, columns]


def average_precision(
    truths: Sequence[np.ndarray], found: Sequence[tuple[np.ndarray, np.ndarray]]
) -> float:
    """AP50 as COCO defines it, in percent, but without its limit of 100 boxes an image.

    Of the true boxes of each image, and the boxes and scores that were found in it.
    """
    annotations = [
        {"image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, boxes in enumerate(truths)
        for box in _corner_and_sides(boxes).tolist()
    ]
    results = [
        {"image_id": i, "category_id": 1, "bbox": box, "score": score}
        for i, (boxes, scores) in enumerate(found)
        for box, score in zip(_corner_and_sides(boxes).tolist(), scores.tolist(), strict=True)
    ]
    if not results:
        return 0.0
    # COCO prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(truths))],
            "categories": [{"id": 1}],
            # COCOeval takes an id of 0 for "not matched".
            "annotations": [{"id": n, **x} for n, x in enumerate(annotations, 1)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.maxDets = [len(results)]
        evaluation.evaluate()
        evaluation.accumulate()
    # Axes: threshold, recall, category, range of areas (all, then three parts), maxDets.
    return 100 * float(evaluation.eval["precision"][0, :, 0, 0, 0].mean())


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _corner_and_sides(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], -1)
