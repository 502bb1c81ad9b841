"""`orthogonalize` beside Optax's Newton-Schulz iteration, on the kernels of transformers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from benchmarks.timing import trees
from benchmarks.timing.measurement import Row, Timed, compile_function, measure
from optax_unitscale.orthogonal import orthogonalize

__all__ = ["SIZES", "TRANSFORMATIONS", "measured"]

# Blocks and their width.
SIZES = ((12, 256), (48, 64))
# The first is what the others are compared with; coefficients and steps are equal but in the last.
TRANSFORMATIONS = {
    "optax.contrib.scale_by_muon(beta=0)": optax.contrib.scale_by_muon(
        beta=0.0, weight_dimension_numbers=lambda tree: jax.tree.map(_dimension_numbers, tree)
    ),
    'orthogonalize(coefficients="muon")': orthogonalize(coefficients="muon"),
    "orthogonalize()": orthogonalize(),
}


def _dimension_numbers(_: Any) -> optax.contrib.MuonDimensionNumbers:
    return optax.contrib.MuonDimensionNumbers()


def _blocks(depth: int, width: int) -> Any:
    """The shapes of the six kernels of each of a transformer's blocks."""
    sizes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    sizes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    return [
        {name: {"kernel": jax.ShapeDtypeStruct(size, jnp.float32)} for name, size in sizes.items()}
        for _ in range(depth)
    ]


def measured(depth: int, width: int, rounds: int, advance: Callable[[], Any]) -> list[Row]:
    """Times every way on donated kernels, each on its own.

    Args:
      depth: how many blocks.
      width: of each.
      rounds: how often each is timed.
      advance: called after each compilation and each round.

    Returns:
      A row a contender.
    """
    shapes = _blocks(depth, width)
    contenders = []
    for name, made in TRANSFORMATIONS.items():
        held = [trees.fill(shapes)]

        def update(updates: Any, made: optax.GradientTransformation = made) -> Any:
            return made.update(updates, made.init(updates))[0]

        program, facts = compile_function(update, held[0], donate=0)

        def call(held: list[Any] = held, program: Callable[[Any], Any] = program) -> None:
            held[0] = jax.block_until_ready(program(held[0]))

        contenders.append(Timed(name, "orthogonal", call, facts=facts))
        advance()
    about = {"model": f"{depth} blocks of width {width}", "parameters": trees.parameters(shapes)}
    return [about | row for row in measure(contenders, rounds, advance)]
