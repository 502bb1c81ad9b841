"""How things are timed: compiled first, then in turn, round by round, and compared by the round."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.timing.methods import PASSES

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
    passes: tuple[str, ...] = ()  # The ceilings that together move the same bytes.
    facts: Row = dataclasses.field(default_factory=dict)  # Known of it beforehand.


class Arrays:
    """Arrays that each program overwrites and hands to the next, and others that stay."""

    def __init__(self, donated: Any, kept: Any = None):
        self.donated, self.kept = donated, kept

    def timed(
        self,
        name: str,
        scope: str,
        function: Callable[..., Any],
        passes: tuple[str, ...] = (),
        needs_kept: bool = False,
    ) -> Timed:
        """Of `(donated, kept) -> (donated, other results)`, compiled."""
        kept = self.kept if needs_kept else None
        program, facts = compile_function(function, self.donated, kept, donate=0)

        def call() -> None:
            self.donated, _ = jax.block_until_ready(program(self.donated, kept))

        return Timed(name, scope, call, passes, facts)


def compile_function(
    function: Callable[..., Any], *arguments: Any, donate: int | tuple[int, ...] = ()
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


def measure(contenders: Sequence[Timed], rounds: int, stop: threading.Event) -> np.ndarray:
    """The seconds of each contender in each round, (contender, round), in turn.

    Rounds to warm up do not count. A KeyboardInterrupt says that `stop` was set.
    """
    taken: list[list[float]] = [[] for _ in contenders]
    for _ in range(WARM_UP + rounds):
        for contender, times in zip(contenders, taken, strict=True):
            start = time.perf_counter()
            contender.call()
            times.append(time.perf_counter() - start)
        time.sleep(SETTLE)
        if stop.is_set():
            raise KeyboardInterrupt
    return np.array(taken)[:, WARM_UP:]


def summarize(contenders: Sequence[Timed], times: np.ndarray, gradient_bytes: int) -> list[Row]:
    """A row a contender, scope by scope, from what `measure` returns.

    It holds the name and the facts; seconds; ratio, the time over that of the scope's first in the
    same round; bytes, how many the passes move; share, what the passes took in the same round over
    the time. These are medians with quartiles. Contenders of scope "ceiling" measure the one pass
    that they have; where several measure the same one, the fastest counts.
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
        row = {"scope": contender.scope, "name": contender.name, "seconds": _quartiles(own)}
        if contender.scope != "ceiling":
            row["ratio"] = _quartiles(own / firsts[contender.scope])
        if contender.passes:
            row["passes"] = list(contender.passes)
            row["bytes"] = gradient_bytes * sum(PASSES[name] for name in contender.passes)
            least = np.sum([ceilings[name] for name in contender.passes], axis=0)
            row["share"] = _quartiles(least / own)
        rows.setdefault(contender.scope, []).append(row | contender.facts)
    return [row for scope in rows.values() for row in scope]


def _quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = (float(f"{x:.4g}") for x in np.percentile(values, [25, 50, 75]))
    return {"median": median, "low": low, "high": high}
