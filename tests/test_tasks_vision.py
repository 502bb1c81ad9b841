"""The tasks that look at images: splits, batches, boxes and their AP50, and short runs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from task_checks import VISION, check_batches, check_results

from benchmarks.__main__ import main
from benchmarks.models.classifiers import MLP
from benchmarks.models.detector import STRIDE, Detector
from benchmarks.runs import Log
from benchmarks.tasks import exploding, image_classification, object_detection, vanishing
from benchmarks.tasks.shared.detection import (
    SYMMETRIES,
    average_precision,
    cut,
    decode,
    encode,
    turn,
)
from optax_unitscale import gradient_norms

pytestmark = pytest.mark.slow

# Two apart, one across the border of the tile below.
BOXES = np.array([[8.0, 16.0, 40.0, 40.0], [60.0, 50.0, 76.0, 90.0], [100.0, 0.0, 140.0, 30.0]])


@pytest.mark.parametrize("name", VISION)
def test_a_batch_is_a_function_of_seed_and_step(name):
    check_batches(name)


@pytest.mark.parametrize("name", VISION)
def test_the_data_are_those_that_compare_was_run_on_and_its_best_rates_are_those_of_train(name):
    check_results(name)


@pytest.mark.parametrize("source", [image_classification, vanishing])
def test_no_image_is_in_two_splits_and_labels_are_mixed_alike(source):
    parts = source.splits()
    images = [{image.tobytes() for image in part.inputs[0]} for part in parts.values()]
    assert all(not a & b for a, b in itertools.combinations(images, 2))
    total = sum(len(part.labels) for part in parts.values())
    for name, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        labels = parts[name].labels
        assert len(labels) == pytest.approx(share * total, abs=1)
        assert np.bincount(labels) == pytest.approx(np.full(10, len(labels) / 10), rel=0.15)
        assert 0 <= parts[name].inputs[0].min() < parts[name].inputs[0].max() == 1


def test_no_photograph_is_in_two_splits():
    names = [name for split in object_detection.NAMES.values() for name in split]
    assert len(set(names)) == len(names) == 4
    photographs = [photo for split in object_detection.splits().values() for photo in split]
    for first, second in itertools.combinations(photographs, 2):
        # Nor do two show the same ground: rows of either are not in the other.
        rows = {row.tobytes() for row in first.pixels[:, :64]}
        assert not rows & {row.tobytes() for row in second.pixels[:, :64]}
    assert sum(len(photograph.boxes) for photograph in photographs) > 900
    for pixels, boxes in photographs:
        assert (boxes >= 0).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (boxes[:, 2:].max(0) <= [pixels.shape[1], pixels.shape[0]]).all()


def test_a_tile_shows_the_boxes_that_lie_in_it_for_the_most_part():
    np.testing.assert_array_equal(
        cut(BOXES, 20, 10, 100, 100),
        # Of the first 20 of 32 columns are left; of the last 20 of 40 columns and 20 of 30 rows,
        # which is too little.
        [[0, 6, 20, 30], [40, 40, 56, 80]],
    )
    assert cut(BOXES, 41, 0, 10, 10).shape == (0, 4)


@pytest.mark.parametrize("how", range(SYMMETRIES))
def test_boxes_turn_with_the_image(how):
    boxes = np.array([[3, 5, 7, 6], [10, 0, 16, 9]])
    image = np.zeros((16, 16), int)
    for value, (left, top, right, bottom) in enumerate(boxes, 1):
        image[top:bottom, left:right] = value
    turned, moved = turn(image, boxes, how)
    for value, (left, top, right, bottom) in enumerate(moved, 1):
        assert (turned[top:bottom, left:right] == value).all()
        assert np.count_nonzero(turned == value) == (right - left) * (bottom - top)


def test_the_symmetries_differ():
    image = np.arange(9).reshape(3, 3)
    turned = {turn(image, np.zeros((0, 4)), how)[0].tobytes() for how in range(SYMMETRIES)}
    assert len(turned) == SYMMETRIES


def test_boxes_survive_encoding():
    boxes, scores = decode(*encode(BOXES[:2], 16), least=0.9)
    np.testing.assert_allclose(sorted(boxes.tolist()), BOXES[:2], atol=1e-4)
    np.testing.assert_array_equal(scores, [1, 1])
    heat, described = encode(np.zeros((0, 4)), 16)
    assert heat.shape == (16, 16)
    assert not heat.any()
    assert not described.any()


def test_perfect_boxes_have_an_ap_of_1_whatever_their_scores():
    truths = [BOXES, BOXES[:1]]
    found = [(BOXES, np.array([0.2, 0.9, 0.5])), (BOXES[:1], np.array([0.1]))]
    assert average_precision(truths, found) == pytest.approx(100)
    # More of them than the 100 that COCO reads.
    corners = 10.0 * np.stack(np.meshgrid(np.arange(15), np.arange(15)), -1).reshape(-1, 2)
    many = np.concatenate([corners, corners + 8], -1)
    assert average_precision([many], [(many, np.linspace(0, 1, len(many)))]) == pytest.approx(100)


def test_ap_is_the_area_under_the_precision_at_101_recalls():
    # By falling score: right, wrong, right; one of three trees is not found. The precision is 1 up
    # to a recall of 1/3, at 34 of the recalls 0, 0.01, ..., 1; 2/3 up to 2/3, at 33; then 0.
    wrong = BOXES[1] + 30
    found = np.stack([BOXES[0], wrong, BOXES[2]])
    expected = 100 * (34 + 33 * 2 / 3) / 101
    assert average_precision([BOXES], [(found, np.array([0.9, 0.8, 0.7]))]) == pytest.approx(
        expected
    )
    assert average_precision([BOXES], [(np.zeros((0, 4)), np.zeros(0))]) == 0
    # The same box twice is one right and one wrong.
    twice = np.stack([BOXES[0], BOXES[0]])
    assert average_precision([BOXES[:1]], [(twice, np.array([0.9, 0.8]))]) == pytest.approx(100)


def test_a_box_must_overlap_by_half():
    box = np.array([[0.0, 0.0, 30.0, 10.0]])
    # An IoU of 20/40, and a little less.
    for shift, expected in ((10.0, 100), (10.1, 0)):
        moved = box + np.array([shift, 0, shift, 0])
        assert average_precision([box], [(moved, np.array([0.5]))]) == pytest.approx(expected)


def test_a_detector_sees_a_tile_and_a_photograph_alike():
    model = Detector(16, nnx.Rngs(0))
    image = np.random.default_rng(0).uniform(size=(1, 256, 256, 3)).astype(np.float32)
    logits = nnx.jit(lambda model, x: model(x)[0][0])
    whole, tile = (logits(model, jnp.asarray(x)) for x in (image, image[:, :192, :192]))
    assert whole.shape == (256 // STRIDE, 256 // STRIDE)
    # Away from the borders, where convolutions are padded. Twelve cells is further than they see.
    np.testing.assert_allclose(whole[:12, :12], tile[:12, :12], atol=1e-5)


def test_gradients_vanish_with_depth():
    task = vanishing.load()
    batch = task.batch(0, 0, 64)
    norms = []
    for depth in (4, 16):
        model = MLP(64, vanishing.WIDTH, depth, 10, nnx.sigmoid, nnx.Rngs(0))
        gradients = nnx.jit(nnx.grad(task.loss))(model, batch)
        norms.append(float(gradient_norms(gradients)["hidden/layers/0/kernel"]))
    assert norms[0] > 1e5 * norms[1] > 0


def test_gradients_explode():
    task = exploding.load()
    gradients = nnx.jit(nnx.grad(task.loss))(task.model(0), task.batch(0, 0, 64))
    norms = {name: float(norm) for name, norm in gradient_norms(gradients).items()}
    assert norms["head/kernel"] < 10
    assert 1e6 < norms["recurrent/cell/dense_i/bias"] < np.inf


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("image_classification", "predicted"),
        ("object_detection", "trees in test"),
        ("vanishing_4", "predicted"),
        ("exploding", "predicted"),
    ],
)
def test_a_short_run_shows_what_the_model_sees(name, shown, tmp_path):
    options = ["--task", name, "--optimizer", "unit_scale", "--steps", "3", "--batch-size", "4"]
    assert main(["train", *options, "--out", str(tmp_path)]) == 0
    log = Log(tmp_path / "metrics.jsonl")
    losses = [entry["loss"] for entry in log.of("step", "unit_scale")]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    (result,) = log.of("result", "unit_scale")
    assert all(0 <= result[split] <= 100 for split in ("train", "validation", "test"))
    assert shown in log.of("sample", "unit_scale")[0]["text"]
    jax.clear_caches()
