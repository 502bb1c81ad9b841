"""How things are timed: compiled first, then in turn, round by round, and compared by the round."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.timing.methods import PASSES

__all__ = ["Row", "Timed", "compile_function", "measure", "quartiles", "summarize"]

Row = dict[str, Any]
WARM_UP = 3
# Seconds in which the threads of other libraries stop spinning.
SETTLE = 0.02


@dataclasses.dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
      name: what people call it.
      scope: what it is compared within, with the first of that scope.
      call: does it once and waits for the end.
      passes: the ceilings that together move the same bytes.
      facts: what is known of it beforehand, for its row.
    """

    name: str
    scope: str
    call: Callable[[], Any]
    passes: tuple[str, ...] = ()
    facts: Row = dataclasses.field(default_factory=dict)


def compile_function(
    function: Callable[..., Any], *arguments: Any, donate: int | tuple[int, ...] = ()
) -> tuple[Callable[..., Any], Row]:
    """A compiled function, and what it took: seconds, and bytes beyond those of its arguments."""
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    memory = program.memory_analysis()
    return program, {
        "trace_seconds": round(traced - start, 3),
        "compile_seconds": round(compiled - traced, 3),
        "temporary_bytes": _beyond_arguments(memory) if memory else None,
    }


def _beyond_arguments(memory: Any) -> int:
    # A result that does not take over a donated argument is memory too.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + new


def measure(
    contenders: Sequence[Timed],
    rounds: int,
    advance: Callable[[], Any],
    gradient_bytes: int | None = None,
) -> list[Row]:
    """Times all contenders in turn.

    Args:
      contenders: in their order; of each scope the first is what the others are compared with.
        Those of scope "ceiling" measure the one pass that they have; where several measure the
        same one, the fastest counts.
      rounds: how often each is timed, after some rounds that do not count.
      advance: called after each round.
      gradient_bytes: of the gradient, for those that have passes.

    Returns:
      A row a contender, scope by scope: its name and facts; seconds; ratio, the time over that of
      its scope's first in the same round; bytes, how many its passes move; share, what its passes
      took in the same round over its time. Seconds, ratio and share are medians with quartiles.
    """
    taken: list[list[float]] = [[] for _ in contenders]
    for _ in range(WARM_UP + rounds):
        for contender, times in zip(contenders, taken, strict=True):
            start = time.perf_counter()
            contender.call()
            times.append(time.perf_counter() - start)
        time.sleep(SETTLE)
        advance()
    return summarize(contenders, np.array(taken)[:, WARM_UP:], gradient_bytes)


def summarize(
    contenders: Sequence[Timed], times: np.ndarray, gradient_bytes: int | None = None
) -> list[Row]:
    """What `measure` returns, from the seconds of each contender in each round.

    Args:
      contenders: as there.
      times: of shape (contenders, rounds).
      gradient_bytes: as there.

    Returns:
      The rows, scope by scope.
    """
    firsts: dict[str, np.ndarray] = {}
    ceilings: dict[str, np.ndarray] = {}
    rows: dict[str, list[Row]] = {}
    for contender, own in zip(contenders, times, strict=True):
        firsts.setdefault(contender.scope, own)
        if contender.scope == "ceiling":
            (name,) = contender.passes
            ceilings[name] = min(ceilings.get(name, own), own, key=np.median)
    for contender, own in zip(contenders, times, strict=True):
        row = {"scope": contender.scope, "name": contender.name, "seconds": quartiles(own)}
        if contender.scope != "ceiling":
            row["ratio"] = quartiles(own / firsts[contender.scope])
        if contender.passes and gradient_bytes is not None:
            row["passes"] = list(contender.passes)
            row["bytes"] = gradient_bytes * sum(PASSES[name] for name in contender.passes)
            least = np.sum([ceilings[name] for name in contender.passes], axis=0)
            row["share"] = quartiles(least / own)
        rows.setdefault(contender.scope, []).append(row | contender.facts)
    return [row for scope in rows.values() for row in scope]


def quartiles(values: np.ndarray) -> dict[str, float]:
    """The median and the quartiles, in four digits."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "median": float(f"{median:.4g}"),
        "low": float(f"{low:.4g}"),
        "high": float(f"{high:.4g}"),
    }
