"""The parts of a run, and what each has to measure: small jobs, so that little is lost."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.timing import gpts, growth, orthogonal, trees
from benchmarks.timing.measurement import WARM_UP, Row
from benchmarks.timing.methods import CEILINGS, SCOPES, STEPS

__all__ = ["DTYPES", "PARTS", "Job", "plan"]

PARTS = {
    "transformation": "every method alone on the gradients of GPTs, beside the ceilings",
    "step": "an optimizer's step, parameters included",
    "training": "a GPT's training step",
    "eager": f"calls without jax.jit on {growth.EAGER_LEAVES} leaves",
    "leaves": "4 M parameters in more and more leaves, run and compiled",
    "groups": "4 M parameters in more and more rows and columns",
    "orthogonal": "orthogonalize beside Optax's on the kernels of transformers",
}
DTYPES = ("float32", "bfloat16")


class Job(NamedTuple):
    """Something to measure in one go.

    Attributes:
      part: a key of `PARTS`.
      title: what the progress bar says.
      steps: how often `measure` calls what it is given.
      seconds: about how long it takes on two CPU cores, for the time left.
      measure: takes a function to call after each step and returns rows.
    """

    part: str
    title: str
    steps: int
    seconds: float
    measure: Callable[[Callable[[], Any]], list[Row]]


def plan(
    parts: Sequence[str],
    models: Sequence[str],
    dtypes: Sequence[str],
    rounds: int,
    most_leaves: int,
    trained: str,
) -> list[Job]:
    """What a run measures, in order.

    Args:
      parts: keys of `PARTS`.
      models: keys of `trees.MODELS`, for the transformation and the step.
      dtypes: for the same; the first is also that of training.
      rounds: how often each contender is timed; a training step, a quarter as often.
      most_leaves: where the growth with leaves ends.
      trained: the model whose training step is timed.

    Returns:
      The jobs.
    """
    few = -(-rounds // 4)
    stopped: dict[str, str] = {}
    timed = WARM_UP + rounds
    jobs: list[Job] = []

    def add(part: str, title: str, steps: int, seconds: float, measure: Any, *about: Any) -> None:
        if part in parts:
            jobs.append(
                Job(part, f"{part} {title}", steps, seconds, functools.partial(measure, *about))
            )

    ceilings = 2 * len(CEILINGS)
    for part, measure, methods in (
        ("transformation", gpts.transformation, sum(map(len, SCOPES.values()))),
        ("step", gpts.step, len(STEPS)),
    ):
        for model, dtype in itertools.product(models, dtypes):
            size = trees.parameters(trees.gpt(model, dtype)) / 1e6
            count = ceilings + methods
            seconds = count * (1 + 4e-4 * rounds * size)
            add(part, f"{model} {dtype}", count + timed, seconds, measure, model, dtype, rounds)
    count = len(gpts.TRAINED) + 2
    about = (trained, dtypes[0], few)
    add("training", trained, count + WARM_UP + few, 30 + 5 * few, gpts.training, *about)
    add("eager", "", timed, rounds / 8, growth.eager, rounds)
    count = len(growth.TRANSFORMATIONS)
    for leaves in growth.LEAVES:
        if leaves <= most_leaves:
            seconds = 2 + rounds / 20 + 1e-5 * leaves**2
            about = (leaves, stopped, rounds)
            add("leaves", f"{leaves}", count + timed, seconds, growth.leaves, *about)
    for number in growth.GROUPS:
        add("groups", f"{number}", 4 + timed, 2 + rounds / 20, growth.groups, number, rounds)
    for depth, width in orthogonal.SIZES:
        count, about = len(orthogonal.TRANSFORMATIONS), (depth, width, rounds)
        title = f"{depth} blocks of width {width}"
        add("orthogonal", title, count + timed, 60 + 2 * rounds, orthogonal.measured, *about)
    return jobs
