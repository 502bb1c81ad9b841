"""Leaves of one shape on one device, whose sums XLA:CPU takes several in one loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from common import NORMS, sample, scaled

from optax_unitscale import gradient_norms

SCOPES: dict[str, Any] = {
    "leaf": "leaf",
    "global": "global",
    "labels": lambda tree: [i % 3 for i in range(len(tree))],
}
# The group of each leaf.
GROUP: dict[str, Callable[[int], int]] = {
    "leaf": lambda i: i,
    "global": lambda i: 0,
    "labels": lambda i: i % 3,
}


def compiled(function: Any, *arguments: Any, devices: int, monkeypatch: Any) -> Any:
    """The program as it is made on a machine with as many devices."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    jax.clear_caches()
    program = jax.jit(function).lower(*arguments).compile()
    monkeypatch.undo()
    jax.clear_caches()
    return program


def alike(count: int, shape: tuple[int, ...], dtype: Any = "float32", spread: float = 0) -> list:
    """Leaves of one shape, the largest `spread` powers of ten above the least."""
    powers = np.linspace(-spread / 2, spread / 2, count)
    return [sample(shape, dtype, 10.0**power, seed=i) for i, power in enumerate(powers)]


def expected(tree: list[Any], norm: str, scope: str = "leaf") -> list[Any]:
    groups: dict[int, list[int]] = {}
    for i in range(len(tree)):
        groups.setdefault(GROUP[scope](i), []).append(i)
    exact = {}
    for which in groups.values():
        exact |= dict(zip(which, oracle.unit([tree[i] for i in which], norm), strict=True))
    return [exact[i] for i in range(len(tree))]


def check(result: Any, exact: Any, dtype: Any) -> None:
    """Two roundings, in the leaf's dtype: the quotient, and what flushing takes of the least."""
    for x, y in zip(result, exact, strict=True):
        wide = np.asarray(x).astype(y.dtype)
        # Of a complex number both parts are flushed.
        least = np.sqrt(2) * float(jnp.finfo(dtype).tiny)
        np.testing.assert_allclose(wide, y, rtol=2 * oracle.epsilon(dtype), atol=least)


@pytest.mark.parametrize(
    ("dtype", "norm"),
    [
        *(("float32", norm) for norm in NORMS),
        *(("bfloat16", "rms"), ("float16", "l2"), ("complex64", "l2"), ("complex64", "linf")),
    ],
)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.usefixtures("one_device")
def test_leaves_of_one_shape_are_unit_scaled_as_others(scope, norm, dtype):
    spread = 6 if dtype == "float16" else 60
    tree = [*alike(9, (3, 5), dtype, spread), sample((2,), dtype), *alike(5, (64, 70), dtype, 4)]
    check(scaled(tree, norm, scope=SCOPES[scope]), expected(tree, norm, scope), dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(), (7,), (64, 70)])
@pytest.mark.usefixtures("one_device")
def test_what_is_wrong_with_one_leaf_stays_with_it(shape, bad, norm):
    tree = [np.array(x) for x in alike(10, shape)]
    tree[2][...] = 0
    tree[6].flat[0] = bad
    result = scaled(tree, norm)
    assert not np.any(result[2])
    assert np.all(np.isnan(result[6]))
    others = [i for i in range(10) if i not in (2, 6)]
    exact = expected([tree[i] for i in others], norm)
    check([result[i] for i in others], exact, "float32")
    assert all(np.all(np.isnan(x)) for x in scaled(tree, norm, scope="global"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("one_device")
def test_vmap_over_some_leaves_and_over_other_axes_agrees_with_a_loop(norm):
    tree = [jnp.asarray(x) for x in alike(8, (4, 4))]
    axes = [0, 1, None, 0, 1, None, 0, 0]
    together = jax.vmap(functools.partial(scaled, norm=norm), in_axes=(axes,))(tree)
    for i in range(4):
        one = [x if a is None else jnp.take(x, i, a) for x, a in zip(tree, axes, strict=True)]
        for x, y in zip(together, scaled(one, norm), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=2e-7)


@pytest.mark.parametrize("scope", SCOPES)
def test_on_one_device_up_to_eight_leaves_share_a_loop(scope, monkeypatch):
    tree = alike(24, (5, 3))

    def sums(devices: int) -> int:
        divide = functools.partial(scaled, scope=SCOPES[scope])
        program = compiled(divide, tree, devices=devices, monkeypatch=monkeypatch)
        return program.as_text().count(" reduce(")

    # Where norms are shared, the loops' sums are added up too.
    assert sums(1) == {"leaf": 3, "global": 4, "labels": 6}[scope]
    # With more, any may be split, which only XLA knows.
    assert sums(2) >= 24


def test_leaves_that_a_mesh_or_a_named_axis_splits_share_none(monkeypatch):
    tree = [jnp.ones((4, 2)), jnp.ones((4, 2))]

    def by_name(tree):
        divide = functools.partial(scaled, scope="global", axis_name="batch")
        return jax.vmap(divide, axis_name="batch")(tree)

    def sums(devices: int, function: Any, tree: Any) -> int:
        program = compiled(function, tree, devices=devices, monkeypatch=monkeypatch)
        return program.as_text().count(" reduce(")

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    placed = jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.P(None, "data")))
    assert sums(1, scaled, tree) < sums(2, scaled, tree)
    with jax.set_mesh(mesh):
        assert sums(1, scaled, placed) == sums(2, scaled, placed)
    assert sums(1, by_name, tree) == sums(2, by_name, tree)


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_four_leaves_below_16384_elements_need_no_branch_and_no_memory(scope, monkeypatch):
    def made(count: int, *shape: int) -> Any:
        tree = [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
        divide = functools.partial(scaled, scope=scope)
        return compiled(divide, tree, devices=1, monkeypatch=monkeypatch)

    few = made(4, 128, 127)
    assert "conditional(" not in few.as_text()
    assert few.memory_analysis().temp_size_in_bytes < 1e4
    assert "conditional(" in made(3, 128, 127).as_text()
    assert "conditional(" in made(4, 128, 128).as_text()
    assert made(9, 500).memory_analysis().temp_size_in_bytes < 1e4


@pytest.mark.usefixtures("one_device")
def test_derivatives_and_recorded_norms_are_those_of_leaves_by_themselves():
    tree = [jnp.asarray(x) for x in alike(6, (3, 4))]

    def loss(tree: Any) -> Any:
        return sum(jnp.sum(x**3) for x in scaled(tree))

    together = jax.grad(loss)(tree)
    norms = gradient_norms(tree)
    for i, (x, slope) in enumerate(zip(tree, together, strict=True)):
        np.testing.assert_allclose(slope, jax.grad(loss)([x])[0], rtol=1e-5, atol=1e-6)
        assert float(norms[str(i)]) == pytest.approx(float(np.linalg.norm(x)), rel=1e-6)
