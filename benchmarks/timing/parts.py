"""The parts of a run: what each compares, small jobs each, so that little is lost."""

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx

from benchmarks.models.gpt import GPT
from benchmarks.timing import trees
from benchmarks.timing.measurement import Arrays, Row, Timed
from benchmarks.timing.methods import CEILINGS, SCOPES
from benchmarks.timing.trees import MODELS
from optax_unitscale import unit_scale
from optax_unitscale.orthogonal import orthogonalize

PARTS = {
    "transformation": "every method alone on the gradients of GPTs, beside the ceilings",
    "training": "a GPT's training step",
    "leaves": "4 M parameters in more and more leaves, run and compiled",
    "orthogonal": "orthogonalize beside Optax's on the kernels of transformers",
}
DTYPES = ("float32", "bfloat16")
RATE = 1e-3
SEQUENCES = 4
# Before plain gradient descent.
TRAINED = {
    "sgd": optax.identity(),
    "optax.normalize_by_update_norm(), sgd": optax.normalize_by_update_norm(),
    "unit_scale(), sgd": unit_scale(),
    'unit_scale(scope="global"), sgd': unit_scale(scope="global"),
}
LEAVES = (10, 30, 100, 300, 1000, 2000)
# Blocks and their width.
SIZES = ((12, 256), (48, 64))
# The first of each scope is what the others are compared with.
SCALING = {
    "optax.clip_by_block_rms(1)": ("leaf", optax.clip_by_block_rms(1.0)),
    "unit_scale()": ("leaf", unit_scale()),
    "optax.normalize_by_update_norm()": ("global", optax.normalize_by_update_norm()),
    'unit_scale(scope="global")': ("global", unit_scale(scope="global")),
}
# Coefficients and steps are equal but in the last.
ORTHOGONAL = {
    "optax.contrib.scale_by_muon(beta=0)": optax.contrib.scale_by_muon(
        beta=0.0,
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(), tree
        ),
    ),
    'orthogonalize(coefficients="muon")': orthogonalize(coefficients="muon"),
    "orthogonalize()": orthogonalize(),
}


# What rows say of what is compared, and the contenders.
Comparison = tuple[Row, list[Timed]]


class Job(NamedTuple):
    """Something to measure in one go: `make` compiles it, and each is timed in so many rounds."""

    part: str
    title: str
    make: Callable[[], Comparison]
    rounds: int


def plan(
    parts: Collection[str],
    models: Sequence[str],
    dtypes: Sequence[str],
    rounds: int,
    trained: str,
) -> list[Job]:
    """What a run measures, in order; training, of one model and in the first dtype, less often."""
    both = list(itertools.product(models, dtypes))
    every = {
        "transformation": (_transformation, both),
        "training": (_training, [(trained, dtypes[0])]),
        "leaves": (_leaves, [(count,) for count in LEAVES]),
        "orthogonal": (_orthogonal, SIZES),
    }
    return [
        Job(
            part,
            " ".join(map(str, (part, *of))),
            functools.partial(make, *of),
            -(-rounds // 4) if part == "training" else rounds,
        )
        for part, (make, sizes) in every.items()
        for of in (sizes if part in parts else ())
    ]


def _about(model: str, dtype: str) -> tuple[Row, Any]:
    """What rows say of a GPT, and its shapes."""
    shapes = trees.gpt(model, dtype)
    size, count = trees.parameters(shapes), len(jax.tree.leaves(shapes))
    return {"model": model, "dtype": dtype, "parameters": size, "leaves": count}, shapes


def _only(change: optax.GradientTransformation) -> Callable[[Any, None], tuple[Any, None]]:
    return lambda updates, _: (change.update(updates, change.init(updates))[0], None)


def _transformation(model: str, dtype: str) -> Comparison:
    """Every method of every scope."""
    about, shapes = _about(model, dtype)
    arrays = Arrays(trees.fill(shapes))
    contenders = _ceilings(arrays)
    for scope, methods in SCOPES.items():
        contenders += [arrays.timed(name, scope, _only(x)) for name, x in methods.items()]
    return about, contenders


def _training(model: str, dtype: str) -> Comparison:
    """A training step on a small batch, with and without unit_scale, and that alone.

    The ratios are to the step without: of the transformation alone it is its share of a step.
    """
    config = MODELS[model]

    def split() -> Any:
        return nnx.split(GPT(config, nnx.Rngs(0)), nnx.Param, ...)

    graph = nnx.eval_shape(split)[0]
    params, rest = jax.jit(lambda: split()[1:])()
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    size = SEQUENCES, config.context + 1
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=size, dtype=np.int32)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    arrays = Arrays(params, jnp.asarray(tokens))
    contenders = []
    for name, change in TRAINED.items():
        optimizer = optax.chain(change, optax.sgd(RATE))

        def train(params: Any, tokens: jax.Array, optimizer: Any = optimizer) -> Any:
            value, gradient = jax.value_and_grad(loss)(params, tokens)
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            return optax.apply_updates(params, updates), value

        contenders.append(arrays.timed(name, "training", train))
    about, shapes = _about(model, dtype)
    alone = Arrays(trees.fill(shapes))
    for name, change in (("", unit_scale()), ('scope="global"', unit_scale(scope="global"))):
        contenders.append(alone.timed(f"unit_scale({name}) alone", "training", _only(change)))
    return {"tokens": SEQUENCES * config.context, **about}, contenders


def _leaves(count: int) -> Comparison:
    shapes = trees.leaves(count)
    arrays, about = Arrays(trees.fill(shapes)), {"parameters": trees.parameters(shapes)}
    contenders = [arrays.timed(name, scope, _only(x)) for name, (scope, x) in SCALING.items()]
    return {"leaves": count, **about}, contenders


def _orthogonal(depth: int, width: int) -> Comparison:
    """The six kernels of each of a transformer's blocks."""
    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    block = {k: {"kernel": jax.ShapeDtypeStruct(x, jnp.float32)} for k, x in shapes.items()}
    blocks = [block] * depth
    about = {"model": f"{depth} blocks of width {width}", "parameters": trees.parameters(blocks)}
    return about, [
        Arrays(trees.fill(blocks)).timed(name, "orthogonal", _only(change))
        for name, change in ORTHOGONAL.items()
    ]


def _ceilings(arrays: Arrays) -> list[Timed]:
    """What memory allows: over the same leaves, and over one float32 array of as many bytes."""
    words = -(-sum(x.nbytes for x in jax.tree.leaves(arrays.donated)) // 4)
    whole = Arrays(jnp.ones(words, jnp.float32))
    return [
        of.timed(f"{name}, {place}", "ceiling", function)
        for place, of in (("same leaves", arrays), ("one array", whole))
        for name, function in CEILINGS.items()
    ]
