"""What holds for every gradient: trees, dtypes, magnitudes, axes and groups drawn by Hypothesis.

A new structure costs a compilation, so most properties are tested on many values of few structures.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from common import LARGE, NORMS, every_norm, program, scaled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, case, cases, gradients, groups, spec

EXAMPLES = settings(
    derandomize=True,
    deadline=None,
    database=None,
    # 64-bit types stay on for all examples of a test that asks for them.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Each of the few has a structure of its own.
MANY, FEW = settings(EXAMPLES, max_examples=25), settings(EXAMPLES, max_examples=20)


def grouped(*members: tuple[jax.ShapeDtypeStruct, str, tuple[int, ...]]) -> Case:
    """Leaves with their labels and axes."""
    leaves, labels, axes = zip(*members, strict=True)
    return case([*leaves], labels=labels, axes=axes)


# Groups of one leaf and of several, of one dtype and of several, small, large and both.
SINGLE = grouped(
    (spec((17,), "float16"), "alone", (0,)),
    (spec(LARGE), "large", (0, 1)),
    (spec((2, 3), "bfloat16"), "mixed", (0, 1)),
    (spec((3,), "complex64"), "mixed", (0,)),
    (spec((0, 2), "float16"), "mixed", (0, 1)),
    (spec(()), "mixed", ()),
    (spec(LARGE, "complex64"), "mixed", (0, 1)),
    (spec((4, 3), "bfloat16"), "rows", (1,)),
    (spec((3, 1, 4)), "rows", (0, 1)),
    (spec((2, 3)), "elements", ()),
)
DOUBLE = grouped(
    (spec((5,), "float64"), "alone", (0,)),
    (spec((3,), "complex128"), "mixed", (0,)),
    (spec((4,)), "mixed", (0,)),
    (spec((2,), "float16"), "mixed", (0,)),
    (spec(LARGE, "float64"), "large", (0, 1)),
)
POOLS = {"32 bits": SINGLE, "64 bits": DOUBLE}


def lost(dtype: np.dtype) -> float:
    """What an element may lose below the normal range: half a step, or all where XLA flushes it."""
    finfo = jnp.finfo(dtype)
    return float(finfo.tiny) * (float(finfo.eps) / 2 if finfo.dtype == np.float16 else 1)


def both(x: Any) -> np.ndarray:
    """The real and the imaginary parts, in NumPy's widest type."""
    x = np.asarray(x)
    return np.stack([np.real(x).astype(np.longdouble), np.imag(x).astype(np.longdouble)])


def check_near(result: Any, expected: Any, dtype: np.dtype, steps: float) -> None:
    """Every real and imaginary part within some steps of its precision, or lost below normal."""
    exact = both(expected)
    allowed = steps * oracle.epsilon(dtype) * np.abs(exact) + lost(dtype)
    assert (np.abs(both(result) - exact) <= allowed).all()


def check_unit(results: list[np.ndarray], rows: list[np.ndarray], norm: str) -> None:
    if not any(row.any() for row in rows):
        assert not any(result.any() for result in results)
        return
    for result, row, quotient in zip(results, rows, oracle.unit(rows, norm), strict=True):
        check_near(result, quotient, row.dtype, steps=4)
    assert abs(oracle.norm_of(results, norm) - 1) <= tolerance(rows, norm)


def tolerance(rows: list[np.ndarray], norm: str) -> float:
    """How far the norm of a result of these dtypes and shapes may be from 1."""
    # By the triangle inequality, what elements lose below normal, the norm loses at most.
    below = oracle.norm_of([np.full(row.shape, lost(row.dtype)) for row in rows], norm)
    # Half a step for each rounded element, and the sum, its root and its reciprocal.
    return 3 * max(oracle.epsilon(row.dtype) for row in rows) + float(below)


def check_all(result: Any, gradient: Any, norm: str, of: Case) -> None:
    assert jax.tree.structure(result) == jax.tree.structure(gradient)
    for after, before in zip(jax.tree.leaves(result), jax.tree.leaves(gradient), strict=True):
        assert isinstance(after, jax.Array)
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
    for results, rows in zip(groups(result, of), groups(gradient, of), strict=True):
        check_unit(results, rows, norm)


@given(data=st.data())
@FEW
def test_any_tree_with_any_groups_keeps_its_structure_and_gets_unit_norms(data):
    norm = data.draw(st.sampled_from(NORMS))
    of = data.draw(cases(["float16", "bfloat16", "float32", "complex64"]))
    gradient = data.draw(gradients(of.tree))
    check_all(scaled(gradient, norm, **of.options), gradient, norm, of)


@functools.cache
def run(pool: str, platform: str) -> Any:
    of = POOLS[pool]
    return program(lambda tree: every_norm(tree, **of.options), of.tree, platform)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("pool", POOLS)
@given(data=st.data())
@MANY
def test_groups_get_unit_norms_that_neither_scaling_again_nor_powers_of_two_change(
    pool, platform, request, data
):
    if pool == "64 bits":
        request.getfixturevalue("x64")
    of, update = POOLS[pool], run(pool, platform)
    gradient = data.draw(gradients(of.tree))
    once = update(gradient)
    for norm in NORMS:
        check_all(once[norm], gradient, norm, of)
    norm = data.draw(st.sampled_from(NORMS))
    twice = update(once[norm])[norm]
    for first, second in zip(groups(once[norm], of), groups(twice, of), strict=True):
        for a, b in zip(first, second, strict=True):
            # Both are rounded, and the second divides by a norm that the first left not quite 1.
            steps = 2 + tolerance(first, norm) / oracle.epsilon(a.dtype)
            check_near(b, a, a.dtype, steps)
    leaves = [*gradient]
    for label in sorted(set(of.labels), key=str):
        indices = [i for i, own in enumerate(of.labels) if own == label]
        power = data.draw(st.integers(*powers([leaves[i] for i in indices])))
        for i in indices:
            leaves[i] = multiply(leaves[i], power)
    for norm, again in update(leaves).items():
        for before, after in zip(groups(once[norm], of), groups(again, of), strict=True):
            for a, b in zip(after, before, strict=True):
                check_near(a, b, b.dtype, steps=3)


def powers(rows: list[np.ndarray]) -> tuple[int, int]:
    """From which to which power of two rows can be multiplied by and stay normal."""
    low, high = [], []
    for row in rows:
        finfo = jnp.finfo(row.dtype)
        sizes = np.abs(both(row))
        if sizes.any():
            exponents = np.frexp(sizes[sizes > 0])[1]
            low.append(int(finfo.minexp) + 1 - int(exponents.min()))
            high.append(int(finfo.maxexp) - int(exponents.max()))
    return max(low, default=0), min(high, default=0)


def multiply(x: np.ndarray, power: int) -> np.ndarray:
    real, imaginary = np.ldexp(both(x), power)
    return (real + 1j * imaginary if np.iscomplexobj(x) else real).astype(x.dtype)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_squares_below_normal_count_beside_a_larger_one(platform, x64):
    # Squared they are just below the normal range, where XLA flushes them to zero.
    tree = [
        np.full(size, np.sqrt(np.finfo(dtype).tiny) * (1 - 2 * np.finfo(dtype).eps), dtype)
        for dtype in (np.float32, np.float64)
        for size in (1000, 5000)
    ]
    update = program(scaled, tree, platform)
    for power in range(0, 53, 3):
        # The larger one comes first, so that a part of the sum is rounded with each that follows.
        for x in tree:
            x[0] = np.ldexp(np.sqrt(np.finfo(x.dtype).tiny), min(power, np.finfo(x.dtype).nmant))
        for x, result in zip(tree, update(tree), strict=True):
            error = abs(oracle.norm_of([np.asarray(result)], "l2") - 1)
            assert error < x.size * np.finfo(x.dtype).eps / 2


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_lowest_element_among_zeros_has_unit_rms(platform):
    # Its norm, divided by the root of their number, is below the normal range.
    tree = [np.zeros(size, dtype) for dtype in (jnp.bfloat16, np.float32) for size in (4, 10**6)]
    for x in tree:
        x[0] = 2.0**-126
    results = program(lambda tree: scaled(tree, "rms"), tree, platform)(tree)
    for x, result in zip(tree, results, strict=True):
        error = abs(oracle.norm_of([np.asarray(result)], "rms") - 1)
        assert error <= oracle.epsilon(x.dtype)
