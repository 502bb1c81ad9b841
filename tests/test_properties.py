"""What holds for every gradient: trees, dtypes, magnitudes, axes and groups drawn by Hypothesis.

A new structure costs a compilation, so most properties are tested on many values of few structures.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from common import NORMS, scaled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, case, cases, gradients, groups, spec

from optax_unitscale import unit_scale

pytestmark = pytest.mark.usefixtures("leaf_size")

NARROW = ["float16", "bfloat16", "float32", "complex64"]
WIDE = [*NARROW, "float64", "complex128"]
EXAMPLES = settings(
    derandomize=True,
    deadline=None,
    database=None,
    # 64-bit types stay on for all examples of a test that asks for them.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Each of the few has a structure of its own.
MANY, FEW = settings(EXAMPLES, max_examples=40), settings(EXAMPLES, max_examples=10)

MIXED = {
    "a": spec((17,), "float16"),
    "b": [spec((2, 3), "bfloat16"), None, spec((3,), "complex64"), spec((0, 2), "float16")],
    "c": (spec(()), {}, spec((2, 4), "float32")),
}
STACKED = [spec((2,)), spec((2, 3), "bfloat16"), (spec((2, 1, 3), "complex64"),)]
DOUBLE_TREE = [spec((5,), "float64"), spec((3,), "complex128"), spec((4,)), spec((2,), "float16")]
SINGLE = {
    "leaf": case(MIXED),
    "global": case(MIXED, "global"),
    "labels": case(MIXED, labels=[0, 1, 0, 2, 1, 1]),
    "axis": case([spec((2, 3))] * 4, axes=[(0,), (1,), (), (0, 1)]),
    "axis and global": case(STACKED, "global", axes=[(), (1,), (1, 2)]),
    "array": case(spec((40,))),
    "half": case([spec((9,), "float16"), spec((9,), "bfloat16")], "global"),
}
DOUBLE = {
    "double": case(DOUBLE_TREE),
    "double and global": case(DOUBLE_TREE, "global"),
}


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


@pytest.fixture(params=["single", "double"])
def pool(request):
    """Dtypes, and the cases made of them; with 64-bit types for those that need them."""
    if request.param == "single":
        return NARROW, SINGLE
    request.getfixturevalue("x64")
    return WIDE, DOUBLE


def check_all(result: Any, gradient: Any, norm: str, of: Case) -> None:
    assert jax.tree.structure(result) == jax.tree.structure(gradient)
    for after, before in zip(jax.tree.leaves(result), jax.tree.leaves(gradient), strict=True):
        assert isinstance(after, jax.Array)
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
    for results, rows in zip(groups(result, of), groups(gradient, of), strict=True):
        check_unit(results, rows, norm)


def draw(data: st.DataObject, known: dict[str, Case]) -> tuple[Case, Any]:
    of = known[data.draw(st.sampled_from([*known]))]
    gradient = data.draw(gradients(of.tree))
    return of, gradient


every_norm = pytest.mark.parametrize("norm", NORMS)


@given(data=st.data())
@FEW
def test_any_tree_with_any_groups_keeps_its_structure_and_gets_unit_norms(pool, data):
    norm = data.draw(st.sampled_from(NORMS))
    of = data.draw(cases(pool[0]))
    gradient = data.draw(gradients(of.tree))
    check_all(scaled(gradient, norm, **of.options), gradient, norm, of)


@every_norm
@given(data=st.data())
@MANY
def test_groups_get_unit_norms_that_neither_scaling_again_nor_powers_of_two_change(
    pool, norm, data
):
    of, gradient = draw(data, pool[1])
    once = scaled(gradient, norm, **of.options)
    check_all(once, gradient, norm, of)
    twice = scaled(once, norm, **of.options)
    for first, second in zip(groups(once, of), groups(twice, of), strict=True):
        for a, b in zip(first, second, strict=True):
            # Both are rounded, and the second divides by a norm that the first left not quite 1.
            steps = 2 + tolerance(first, norm) / oracle.epsilon(a.dtype)
            check_near(b, a, a.dtype, steps)
    leaves, structure = jax.tree.flatten(gradient)
    for label in set(of.labels):
        indices = [i for i, own in enumerate(of.labels) if own == label]
        power = data.draw(st.integers(*powers([leaves[i] for i in indices])))
        for i in indices:
            leaves[i] = multiply(leaves[i], power)
    multiplied = jax.tree.unflatten(structure, leaves)
    again = scaled(multiplied, norm, **of.options)
    for before, after in zip(groups(once, of), groups(again, of), strict=True):
        # XLA fuses the addition of two products, each the square of a complex number's part or the
        # sum of a small leaf's squares, as it likes, and may do it otherwise where it sums again.
        is_exact = norm in ("l1", "linf") or (len(before) == 1 and np.isrealobj(before[0]))
        for a, b in zip(after, before, strict=True):
            if is_exact:
                np.testing.assert_array_equal(a, b)
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


@every_norm
@given(data=st.data())
@MANY
def test_the_order_of_leaves_is_irrelevant(norm, data):
    """Alone to the last bit; together to three steps, for sums in another order differ."""
    gradient = data.draw(gradients([spec((3,))] * 5))
    order = data.draw(st.permutations(range(5)))
    for scope in ("leaf", "global"):
        of = case(gradient, scope)
        before = scaled(gradient, norm, **of.options)
        after = scaled([gradient[i] for i in order], norm, **of.options)
        for i, x in zip(order, after, strict=True):
            if scope == "leaf" or norm == "linf":
                np.testing.assert_array_equal(np.asarray(x), np.asarray(before[i]))
            check_near(x, before[i], x.dtype, steps=3)


@pytest.mark.parametrize("norm", ["l2", "rms"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_thousand_squares_below_normal_count_beside_a_larger_one(norm, dtype, x64):
    finfo = np.finfo(dtype)
    # Squared they are just below the normal range, where XLA flushes them to zero.
    gradient = np.full(1000, np.sqrt(finfo.tiny) * (1 - 2 * finfo.eps), finfo.dtype)
    for power in range(finfo.nmant):
        gradient[0] = np.ldexp(np.sqrt(finfo.tiny), power)
        result, _ = unit_scale(norm).update(gradient, optax.EmptyState())
        # The larger one comes first, so that a part of the sum is rounded with each that follows.
        assert abs(oracle.norm_of([np.asarray(result)], norm) - 1) < 10 * finfo.eps


@pytest.mark.parametrize("size", [4, 1000, 10**6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lowest_elements_among_zeros_have_unit_rms(dtype, size):
    gradient = np.zeros(size, jnp.dtype(dtype))
    gradient[0] = 2.0**-126
    result, _ = unit_scale("rms").update(gradient, optax.EmptyState())
    error = abs(oracle.norm_of([np.asarray(result)], "rms") - 1)
    assert error <= oracle.epsilon(gradient.dtype)
