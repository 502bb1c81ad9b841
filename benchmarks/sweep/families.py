"""Models that differ in one size: a learning rate found on the smallest may carry over."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from benchmarks.models.gpt import GPT, GPTConfig
from benchmarks.models.mlp import MLP
from benchmarks.tasks import Task, language_modelling, vanishing

__all__ = ["FAMILIES", "Family", "Member"]

WIDTH, DEPTH, HEAD = 64, 2, 32
MLP_DEPTH = 3


class Member(NamedTuple):
    """One size of a family: a task, and the steps and batch size of its runs."""

    task: Task
    steps: int
    batch_size: int


class Family(NamedTuple):
    """Models, or runs, that differ in one size.

    Attributes:
      what: what the size counts.
      sizes: on CPU.
      large: on an accelerator.
      member: makes one, from a size and how many times the steps.
      orthogonal: on CPU, the largest size for those of `ORTHOGONAL`, whose steps cost the cube of
        the width, unless they are asked for.
    """

    what: str
    sizes: tuple[int, ...]
    large: tuple[int, ...]
    member: Callable[[int, float], Member]
    orthogonal: float = math.inf


def _unmeasured(*_: Any) -> float:
    """In place of a metric: what counts is the training loss, which is less noisy."""
    return math.nan


def _gpt(width: int = WIDTH, depth: int = DEPTH) -> Task:
    config = GPTConfig(
        language_modelling.CONFIG.vocabulary,
        language_modelling.CONFIG.context,
        depth=depth,
        heads=width // HEAD,
        width=width,
    )
    return dataclasses.replace(
        language_modelling.load(),
        model=lambda seed: GPT(config, nnx.Rngs(seed)),
        evaluate=_unmeasured,
    )


def _mlp(width: int) -> Task:
    return dataclasses.replace(
        vanishing.load(),
        model=lambda seed: MLP(64, width, MLP_DEPTH, 10, nnx.relu, nnx.Rngs(seed)),
        evaluate=_unmeasured,
    )


FAMILIES = {
    "gpt_width": Family(
        "width of a GPT, 2 blocks",
        (32, 64, 128, 256, 512),
        (128, 256, 512, 1024, 2048),
        lambda size, length: Member(_gpt(width=size), round(200 * length), 8),
    ),
    "gpt_depth": Family(
        "blocks of a GPT of width 64",
        (2, 4, 8, 16),
        (2, 4, 8, 16, 32),
        lambda size, length: Member(_gpt(depth=size), round(200 * length), 8),
    ),
    "mlp_width": Family(
        "width of an MLP on digits, 3 hidden layers",
        (64, 256, 1024, 4096),
        (64, 256, 1024, 4096, 16384),
        lambda size, length: Member(_mlp(size), round(60 * length), 64),
        # At 4096 a step takes 40 s on one core, and all of them eight hours.
        orthogonal=1024,
    ),
    "gpt_batch": Family(
        "sequences in a batch of a GPT of width 64",
        (4, 16, 64),
        (8, 32, 128, 512),
        lambda size, length: Member(_gpt(), round(200 * length), size),
    ),
    "gpt_steps": Family(
        "steps of a GPT of width 64",
        (100, 400, 1600),
        (1000, 4000, 16000),
        # The size is the length.
        lambda size, _: Member(_gpt(), size, 8),
    ),
}
