"""The contract of the transformation: what it keeps, what it compiles, where it may stand."""

from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from common import EMPTY, LARGE, NORMS, compilations, every_norm, sample, scaled
from jax import export, lax
from jax.experimental import checkify

from optax_unitscale import clip_norm, gradient_norms, unit_scale


def check(result: Any, expected: Any, dtype: Any = "float32") -> None:
    """Four roundings, in the leaf's dtype: the norm, its reciprocal, the product, the result."""
    result, eps = np.asarray(result), oracle.epsilon(dtype)
    assert result.dtype == dtype
    wide = result if np.iscomplexobj(result) else result.astype(np.float64)
    np.testing.assert_allclose(wide, np.asarray(expected), rtol=4 * eps, atol=0)


def test_the_state_is_empty_and_params_and_extra_arguments_change_nothing():
    transformation, gradient = unit_scale(), jnp.ones(3)
    assert isinstance(transformation, optax.GradientTransformationExtraArgs)
    state = transformation.init(gradient)
    assert isinstance(state, optax.EmptyState)
    more, after = transformation.update(gradient, state, gradient, value=jnp.ones(()), other="x")
    assert after is state
    np.testing.assert_array_equal(more, scaled(gradient))


def test_an_eager_update_is_one_computation_that_equal_factories_share():
    tree = {"a": jnp.asarray(sample((3, 5))), "b": jnp.asarray(sample((3, 7)))}
    labels = {"a": "x", "b": "x"}

    # Callables are made anew for each call.
    def step():
        scaled(tree, "rms", scope=dict(labels), axis={"a": (1,), "b": -1})
        scaled(tree, scope=lambda tree: labels, axis=lambda path, leaf: 1)
        clip_norm(1.0, scope=lambda tree: labels).update(tree, EMPTY)
        gradient_norms(tree, scope=lambda tree: labels, axis=lambda path, leaf: 1)

    before = compilations()
    step()
    assert compilations() - before == 4
    step()
    assert compilations() - before == 4


def test_another_min_norm_compiles_nothing_and_is_obeyed():
    gradient, kinds = jnp.full((6,), 2.0), (float, np.float32, np.float64, jnp.float32)
    for kind in kinds:
        scaled(gradient, "linf", min_norm=kind(8))
    traced = jax.jit(lambda floor: scaled(gradient, "linf", min_norm=floor))
    traced(jnp.float32(1))
    floors = [kind(floor) for kind in kinds for floor in (8, 16, 1e-3)]
    before = compilations()
    results = [scaled(gradient, "linf", min_norm=floor) for floor in floors]
    results += [traced(floor) for floor in floors[-3:]]
    assert compilations() == before
    for result, expected in zip(results, [0.25, 0.125, 1.0] * (len(kinds) + 1), strict=True):
        np.testing.assert_array_equal(result, np.float32(expected))


def test_above_min_norm_the_norm_is_one_and_below_the_update_is_linear():
    update = jax.jit(
        lambda x, floors: {norm: scaled(x, norm, min_norm=floors[norm]) for norm in NORMS}
    )
    for magnitude in (1e-30, 1e-3, 1.0, 1e30):
        x = sample((4, 9), magnitude=magnitude)
        exact = {norm: float(oracle.norm_of([x], norm)) for norm in NORMS}
        for by in (1 / 64, 64):
            floors = {norm: np.float32(by * size) for norm, size in exact.items()}
            for norm, result in update(x, floors).items():
                check(result, x.astype(np.float64) / max(exact[norm], float(floors[norm])))


def test_every_slice_and_leaf_has_min_norm_for_itself_in_any_dtype():
    lines = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3e5, 4e5], [np.nan, 1.0]])
    tree = {"a": jnp.float32(lines), "b": jnp.bfloat16(lines), "c": jnp.full((5, 1), 0.25)}
    result = scaled(tree, axis=-1, min_norm=2.0)
    for name, dtype in (("a", jnp.float32), ("b", jnp.bfloat16)):
        expected = np.asarray(tree[name], np.float64) / [[5], [2], [1], [5e5], [1]]
        expected[4] = np.nan
        check(result[name], expected, dtype)
    check(result["c"], np.full((5, 1), 0.125))
    pair = [jnp.asarray([3.0]), jnp.asarray([4.0])]
    together = scaled(pair, scope="global", min_norm=8)
    check(together[0], [0.375])
    check(together[1], [0.5])


@pytest.mark.parametrize("floor", [3e38, np.inf])
def test_a_min_norm_at_the_end_of_the_range_gives_zeros_and_hides_no_nan(floor):
    tree = [jnp.ones(4), jnp.zeros(4), jnp.ones(()), jnp.ones(LARGE), jnp.array([1.0, jnp.nan])]
    *zeros, nan = jax.jit(lambda floor: scaled(tree, min_norm=floor))(floor)
    assert all((np.asarray(x) == 0).all() for x in zeros)
    assert np.isnan(nan).all()


def test_below_min_norm_the_derivative_is_that_of_a_division_by_it():
    jacobian = jax.jit(jax.jacrev(lambda x: scaled(x, min_norm=8.0)))
    for point in (jnp.zeros(3), jnp.ones(3)):
        np.testing.assert_array_equal(np.asarray(jacobian(point)), np.eye(3) / 8)


def test_sizes_that_jax_export_leaves_open_are_normed():
    leaf = jax.ShapeDtypeStruct(export.symbolic_shape("n, 3"), jnp.float32)
    made = export.export(jax.jit(lambda x: (scaled(x, "rms"), scaled(x, "l1", axis=0))))(leaf)
    for n in (1, 5, 3000):
        gradient = sample((n, 3))
        rms, columns = made.call(jnp.asarray(gradient))
        check(rms, gradient / oracle.norm_of([gradient], "rms"))
        check(columns, gradient / np.abs(gradient).sum(axis=0, dtype=np.float64))


def test_what_holds_no_elements_passes_through():
    tree = {
        "none": None,
        "masked": optax.MaskedNode(),
        "dict": {},
        "tuple": (),
        "no elements": jnp.zeros((0, 3), jnp.bfloat16),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "x": jnp.array([3.0, 4.0]),
    }
    for scope in ("leaf", "global"):
        result = scaled(tree, scope=scope)
        assert jax.tree.structure(result) == jax.tree.structure(tree)
        check(result["x"], [0.6, 0.8])
        for name in ("no elements", "float0"):
            assert (result[name].shape, result[name].dtype) == (tree[name].shape, tree[name].dtype)


@pytest.mark.parametrize("tree", [{}, None, {"a": None}, [jnp.zeros((0, 2))], optax.MaskedNode()])
def test_a_tree_without_elements_comes_back_as_it_was(tree):
    for scope in ("leaf", "global", lambda updates: jax.tree.map(lambda _: "x", updates)):
        result = scaled(tree, scope=scope)
        assert jax.tree.structure(result) == jax.tree.structure(tree)
        assert gradient_norms(tree, scope=scope) == {}


def test_scalars_become_their_sign_and_may_be_pythons_or_numpys():
    tree = [-2.0, 0.0, 5e-30, np.float32(-3e30), np.array(7.0, np.float16), jnp.float32(-1)]
    for result in jax.jit(lambda: every_norm(tree))().values():
        assert [float(x) for x in result] == [-1, 0, 1, -1, 1, -1]
    result = scaled(tree)
    assert all(isinstance(x, jax.Array) for x in result)
    assert [x.dtype for x in result] == ["float32"] * 4 + ["float16", "float32"]


def test_without_jit_leaves_may_be_pythons_or_numpys_too():
    tree = {"a": -2.0, "b": 3 + 4j, "c": np.array([3.0, 4.0]), "d": None}
    with jax.disable_jit():
        result, norms = scaled(tree), gradient_norms(tree)
    assert result["a"] == -1
    check(result["b"], 0.6 + 0.8j, "complex64")
    check(result["c"], [0.6, 0.8])
    assert norms == {"a": 2, "b": 5, "c": 5}


@pytest.mark.parametrize("wide", [[], ["float64", "complex128"]], ids=["x32", "x64"])
def test_every_leaf_of_a_mixed_tree_keeps_its_dtype(wide, request):
    if wide:
        request.getfixturevalue("x64")
    dtypes = ["float16", "bfloat16", "float32", "complex64", *wide]
    arrays = {d: sample((7,), d, seed=i) for i, d in enumerate(dtypes)}
    together = dict(zip(arrays, oracle.unit(list(arrays.values()), "l2"), strict=True))
    for dtype, result in scaled(arrays, scope="global").items():
        # float64 leaves meet the float32 ones in a float64 sum, so only their own dtype rounds.
        check(result, together[dtype], jnp.dtype(dtype))


WAYS = {
    "vmap": jax.vmap,
    "scan": lambda f: lambda xs: lax.scan(lambda n, x: (n + 1, f(x)), 0, xs)[1],
    "cond": lambda f: lambda xs: jnp.stack([lax.cond(x[0] >= 0, f, f, x) for x in xs]),
    "cond in vmap": lambda f: jax.vmap(lambda x: lax.cond(x[0] >= 0, f, f, x)),
    "checkpoint": lambda f: jax.vmap(jax.checkpoint(f)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_update_may_stand_inside(way):
    magnitudes = np.array([1e-30, 0, 1, 1e30], np.float32)
    for size in (6, 5000) if way in ("vmap", "scan") else (6,):
        x = sample((4, size)) * magnitudes[:, None]
        expected = [oracle.unit([row], "l2")[0] if row.any() else row for row in x]
        check(jax.jit(WAYS[way](scaled))(jnp.asarray(x)), np.stack(expected))


def test_donated_gradients_make_room_for_the_update():
    tree = {"a": jnp.asarray(sample((8, 16))), "b": jnp.asarray(sample((32,), "bfloat16"))}
    expected = scaled(tree)
    # A donation that finds no use is a warning, and here an error.
    result = jax.jit(scaled, donate_argnums=0)(tree)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))
    for leaf, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        check(leaf, np.asarray(other, np.float64), leaf.dtype)


@pytest.mark.parametrize("transformation", [unit_scale(), clip_norm(1.0)])
def test_zeros_and_tiny_leaves_divide_by_no_zero_where_checkify_looks_and_naive_ones_do(
    transformation,
):
    tree = {"zero": jnp.zeros(3), "tiny": jnp.full(3, 1e-40), "large": jnp.zeros(LARGE)}

    def update(tree):
        return transformation.update(tree, optax.EmptyState())[0]

    def naive(tree):
        return jax.tree.map(lambda x: x / jnp.linalg.norm(x), tree)

    check = [checkify.checkify(f, errors=checkify.div_checks)(tree)[0] for f in (update, naive)]
    assert check[0].get() is None
    assert "division by zero" in (check[1].get() or "")
