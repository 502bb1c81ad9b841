"""GPT by GPT: the transformation alone, an optimizer's whole step, and a training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.models.gpt import GPT
from benchmarks.timing import pytorch, trees
from benchmarks.timing.measurement import Row, Timed, compile_function, measure
from benchmarks.timing.methods import CEILINGS, SCOPES, STEPS, Method
from benchmarks.timing.trees import MODELS

__all__ = ["step", "training", "transformation"]

RATE = 1e-3
SEQUENCES = 4
TRAINED = ("sgd", "unit_scale(), sgd", 'unit_scale(scope="global"), sgd')
_Compiled = tuple[Callable[[], None], Row]


class _Arrays:
    """The gradient, or the parameters, which each program overwrites and hands to the next."""

    def __init__(self, donated: Any, kept: Any = None):
        self.donated, self.kept = donated, kept

    def compile(self, function: Callable[..., Any], needs_kept: bool = True) -> _Compiled:
        """A call of `(donated, kept) -> (donated, other results)`, and what it took to compile."""
        kept = self.kept if needs_kept else None
        program, facts = compile_function(function, self.donated, kept, donate=0)

        def call() -> None:
            self.donated, _ = jax.block_until_ready(program(self.donated, kept))

        return call, facts


def transformation(model: str, dtype: str, rounds: int, advance: Callable[[], Any]) -> list[Row]:
    """Times every method of every scope on one donated gradient, beside the ceilings.

    The scope "axis" has a gradient of its own, of the same GPT with its blocks stacked.
    """
    shapes = trees.gpt(model, dtype)
    plain = _Arrays(trees.fill(shapes), trees.fill(shapes, 1))
    stacked = _Arrays(trees.fill(trees.stack_blocks(shapes)))
    contenders = _ceilings(plain, advance)
    for scope, methods in SCOPES.items():
        arrays = stacked if scope == "axis" else plain
        for name, method in methods.items():
            call, facts = arrays.compile(_paired(method), method.needs_params)
            contenders.append(Timed(name, scope, call, method.passes, facts))
            advance()
    contenders += pytorch.transformations(shapes)
    return _measure(contenders, model, dtype, shapes, rounds, advance)


def step(model: str, dtype: str, rounds: int, advance: Callable[[], Any]) -> list[Row]:
    """Times optimizer steps whose parameters are donated; the gradient stays as it is."""
    shapes = trees.gpt(model, dtype)
    params = _Arrays(trees.fill(shapes), trees.fill(shapes, 1))
    contenders = _ceilings(params, advance)
    for name, (first, passes) in STEPS.items():
        optimizer = optax.chain(first, optax.sgd(RATE))

        def apply(params: Any, updates: Any, optimizer: Any = optimizer) -> tuple[Any, None]:
            updates, _ = optimizer.update(updates, optimizer.init(params), params)
            return optax.apply_updates(params, updates), None

        call, facts = params.compile(apply)
        contenders.append(Timed(name, "step", call, passes, facts))
        advance()
    contenders += pytorch.steps(shapes)
    return _measure(contenders, model, dtype, shapes, rounds, advance)


def training(model: str, dtype: str, rounds: int, advance: Callable[[], Any]) -> list[Row]:
    """Times a GPT's training step, on a small batch, with and without unit_scale, and that alone.

    Returns:
      A row a contender, with the `tokens` of a step. The ratios are to the step without: of the
      transformation alone it is its share of a step.
    """
    config = MODELS[model]

    def split() -> Any:
        return nnx.split(GPT(config, nnx.Rngs(0)), nnx.Param, ...)

    graph = nnx.eval_shape(split)[0]
    params, rest = jax.jit(lambda: split()[1:])()
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tokens = np.random.default_rng(0).integers(
        config.vocabulary, size=(SEQUENCES, config.context + 1), dtype=np.int32
    )

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    arrays = _Arrays(params, jnp.asarray(tokens))
    contenders = []
    for name in TRAINED:
        optimizer = optax.chain(STEPS[name][0], optax.sgd(RATE))

        def train(params: Any, tokens: jax.Array, optimizer: Any = optimizer) -> Any:
            value, gradient = jax.value_and_grad(loss)(params, tokens)
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            return optax.apply_updates(params, updates), value

        call, facts = arrays.compile(train)
        contenders.append(Timed(name, "training", call, facts=facts))
        advance()
    shapes = trees.gpt(model, dtype)
    alone = _Arrays(trees.fill(shapes))
    for scope, name in (("leaf", "unit_scale()"), ("global", 'unit_scale(scope="global")')):
        method = SCOPES[scope][name]
        call, facts = alone.compile(_paired(method), needs_kept=False)
        contenders.append(Timed(f"{name} alone", "training", call, facts=facts))
        advance()
    tokens_a_step = {"tokens": SEQUENCES * config.context}
    rows = _measure(contenders, model, dtype, shapes, rounds, advance)
    return [tokens_a_step | row for row in rows]


def _paired(method: Method) -> Callable[[Any, Any], tuple[Any, None]]:
    return lambda updates, params: (method.function(updates, params), None)


def _ceilings(arrays: _Arrays, advance: Callable[[], Any]) -> list[Timed]:
    """What memory allows: over the same leaves, and over one float32 array of as many bytes."""
    words = -(-_bytes(arrays.donated) // 4)
    whole = _Arrays(jnp.ones(words, jnp.float32), jnp.ones(words, jnp.float32))
    contenders = []
    for place, of in (("same leaves", arrays), ("one array", whole)):
        for name, function in CEILINGS.items():
            call, facts = of.compile(function, needs_kept=name == "triad")
            contenders.append(Timed(f"{name}, {place}", "ceiling", call, (name,), facts))
            advance()
    return contenders


def _measure(
    contenders: list[Timed],
    model: str,
    dtype: str,
    shapes: Any,
    rounds: int,
    advance: Callable[[], Any],
) -> list[Row]:
    about = {
        "model": model,
        "dtype": dtype,
        "parameters": trees.parameters(shapes),
        "leaves": len(jax.tree.leaves(shapes)),
    }
    rows = measure(contenders, rounds, advance, _bytes(shapes))
    return [about | row for row in rows]


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
