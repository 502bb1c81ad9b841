"""What the tests of each task's file check, there, so that its data are read once."""

import json
import pathlib

import jax
import numpy as np

from benchmarks import tasks

TEXT = ("dialogue", "question_answering", "summarization", "translation")
VISION = ("exploding", "image_classification", "object_detection")
VISION += ("vanishing", "vanishing_16", "vanishing_32", "vanishing_4")
SWEEPS = pathlib.Path(__file__).parents[1] / "benchmarks/results/cpu-2-cores/compare"


def check_batches(name: str) -> None:
    """A batch is a function of seed and step."""
    batch = tasks.load(name).batch
    which = ((3, 5), (3, 5), (3, 6), (4, 5))
    first, again, *others = (jax.tree.leaves(batch(*x, 6)) for x in which)
    for array, same in zip(first, again, strict=True):
        assert len(array) == 6
        np.testing.assert_array_equal(array, same)
    assert not any(np.array_equal(first[0], other[0]) for other in others)


def check_results(name: str) -> None:
    """The data are those that `compare` was run on, and its best rates are those of `train`."""
    first = json.loads((SWEEPS / f"{name}.jsonl").read_text().partition("\n")[0])
    assert tasks.load(name).fingerprint == first["data_sha256"]
    assert {"sgd", "clip", "adamw", "muon", "unit_scale"} <= set(tasks.tuned(name))
