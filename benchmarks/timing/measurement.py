"""How things are timed: compiled first, then in turn, round by round, and compared by the round."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Row = dict[str, Any]
WARM_UP = 3
# Seconds in which the threads of other libraries stop spinning.
SETTLE = 0.02


@dataclasses.dataclass(frozen=True)
class Timed:
    """Something to time, beside the others of its scope, and above all the first of them."""

    name: str
    scope: str
    call: Callable[[], Any]  # Does it once and waits for the end.
    facts: Row = dataclasses.field(default_factory=dict)  # Known of it beforehand.


class Arrays:
    """Arrays that each program overwrites and hands to the next, and others that stay."""

    def __init__(self, donated: Any, kept: Any = None):
        self.donated, self.kept = donated, kept

    def timed(self, name: str, scope: str, function: Callable[..., Any]) -> Timed:
        """Of `(donated, kept) -> (donated, other results)`, compiled."""
        program, facts = compile_function(function, self.donated, self.kept, donate=(0,))

        def call() -> None:
            self.donated, _ = jax.block_until_ready(program(self.donated, self.kept))

        return Timed(name, scope, call, facts)


def compile_function(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[Callable[..., Any], Row]:
    """A compiled function, and what it took: seconds, and bytes beyond those of its arguments."""
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    facts: Row = {
        "trace_seconds": round(traced - start, 3),
        "compile_seconds": round(compiled - traced, 3),
    }
    if memory := program.memory_analysis():
        # A result that does not take over a donated argument is memory too.
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        facts["temporary_bytes"] = memory.temp_size_in_bytes + new
    return program, facts


def measure(contenders: Sequence[Timed], rounds: int) -> np.ndarray:
    """The seconds of each contender in each round, (contender, round), in turn.

    Rounds to warm up do not count.
    """
    taken: list[list[float]] = [[] for _ in contenders]
    for _ in range(WARM_UP + rounds):
        for contender, times in zip(contenders, taken, strict=True):
            start = time.perf_counter()
            contender.call()
            times.append(time.perf_counter() - start)
        time.sleep(SETTLE)
    return np.array(taken)[:, WARM_UP:]


def summarize(contenders: Sequence[Timed], times: np.ndarray) -> list[Row]:
    """A row a contender, from what `measure` returns.

    It holds the name and the facts; seconds; and ratio, the time over that of the scope's first in
    the same round. These are medians with quartiles.
    """
    firsts: dict[str, np.ndarray] = {}
    rows = []
    for contender, own in zip(contenders, times, strict=True):
        first = firsts.setdefault(contender.scope, own)
        found = {"seconds": _quartiles(own), "ratio": _quartiles(own / first)}
        rows.append({"scope": contender.scope, "name": contender.name} | found | contender.facts)
    return rows


def _quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = (float(f"{x:.4g}") for x in np.percentile(values, [25, 50, 75]))
    return {"median": median, "low": low, "high": high}
