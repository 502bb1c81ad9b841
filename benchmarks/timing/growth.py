"""Calls without jit, and how time grows with the number of leaves and of groups."""

from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import trees
from benchmarks.timing.measurement import Row, Timed, compile_function, measure
from optax_unitscale import unit_scale

__all__ = ["COMPILE_LIMIT", "GROUPS", "LEAVES", "eager", "groups", "leaves"]

EAGER_LEAVES = 150
LEAVES = (10, 30, 100, 300, 1000, 2000, 3000, 5000)
GROUPS = (1, 4, 16, 64, 256, 1024, 4096)
# A contender that took longer to compile, in seconds, is not asked again for more leaves.
COMPILE_LIMIT = 60.0
# The first of each scope is what the others are compared with.
TRANSFORMATIONS = {
    "optax.clip_by_block_rms(1)": ("leaf", optax.clip_by_block_rms(1.0)),
    "unit_scale()": ("leaf", unit_scale()),
    "optax.normalize_by_update_norm()": ("global", optax.normalize_by_update_norm()),
    'unit_scale(scope="global")': ("global", unit_scale(scope="global")),
}


def eager(rounds: int, advance: Callable[[], Any]) -> list[Row]:
    """Times calls without `jax.jit`, on 150 leaves of 4096 elements; nothing is donated."""
    updates = [jnp.ones((64, 64)) * (1 + i) for i in range(EAGER_LEAVES)]

    def call_of(made: optax.GradientTransformation) -> Callable[[], None]:
        state = made.init(updates)
        return lambda: jax.block_until_ready(made.update(updates, state)[0])

    names = ("optax.normalize_by_update_norm()", *TRANSFORMATIONS)
    contenders = [
        Timed(name, "eager", call_of(TRANSFORMATIONS[name][1])) for name in dict.fromkeys(names)
    ]
    about = {"leaves": EAGER_LEAVES, "parameters": trees.parameters(updates)}
    return [about | row for row in measure(contenders, rounds, advance)]


def leaves(
    count: int, stopped: MutableMapping[str, str], rounds: int, advance: Callable[[], Any]
) -> list[Row]:
    """Times trees of 4 million parameters in `count` leaves, run and compiled.

    Args:
      count: of leaves.
      stopped: the contenders that are left out, and why; those whose compilation takes longer than
        `COMPILE_LIMIT` join it.
      rounds: how often each is timed.
      advance: called after each compilation and each round.

    Returns:
      A row a contender; that of one left out has `stopped` in place of figures.
    """
    shapes = trees.leaves(count)
    about = {"leaves": count, "parameters": trees.parameters(shapes)}
    held = [trees.fill(shapes)]
    contenders, rows = [], []
    for name, (scope, made) in TRANSFORMATIONS.items():
        if name in stopped:
            rows.append({**about, "scope": scope, "name": name, "stopped": stopped[name]})
            advance()
            continue

        def update(updates: Any, made: optax.GradientTransformation = made) -> Any:
            return made.update(updates, made.init(updates))[0]

        program, facts = compile_function(update, held[0], donate=0)
        seconds = facts["trace_seconds"] + facts["compile_seconds"]
        if seconds > COMPILE_LIMIT:
            stopped[name] = f"its compilation for {count} leaves took {seconds:.0f} s"
        contenders.append(Timed(name, scope, _handing(held, program), facts=facts))
        advance()
    if contenders:
        rows += [about | row for row in measure(contenders, rounds, advance)]
    order = list(TRANSFORMATIONS)
    return sorted(rows, key=lambda row: order.index(row["name"]))


def groups(count: int, rounds: int, advance: Callable[[], Any]) -> list[Row]:
    """Times 4 arrays of a million elements whose rows, or columns, each have a norm of their own.

    Args:
      count: of rows, or columns, in each.
      rounds: how often each is timed.
      advance: called after each compilation and each round.

    Returns:
      A row a contender.
    """
    contenders = []
    for scope, axis, shape in (
        ("rows", 1, (count, 2**20 // count)),
        ("columns", 0, (2**20 // count, count)),
    ):
        held = [[jnp.ones(shape) for _ in range(4)]]
        made = unit_scale(axis=axis)

        def naive(updates: Any, axis: int = axis) -> Any:
            return jax.tree.map(
                lambda x: x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True)), updates
            )

        def ours(updates: Any, made: optax.GradientTransformation = made) -> Any:
            return made.update(updates, made.init(updates))[0]

        names = (f"x * rsqrt(sum(x * x, {axis}))", f"unit_scale(axis={axis})")
        for name, function in zip(names, (naive, ours), strict=True):
            program, facts = compile_function(function, held[0], donate=0)
            contenders.append(Timed(name, scope, _handing(held, program), facts=facts))
            advance()
    about = {"groups": count, "parameters": 4 * 2**20}
    return [about | row for row in measure(contenders, rounds, advance)]


def _handing(held: list[Any], program: Callable[[Any], Any]) -> Callable[[], None]:
    """A call on the donated arrays in `held`, which leaves its result there."""

    def call() -> None:
        held[0] = jax.block_until_ready(program(held[0]))

    return call
