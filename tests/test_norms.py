"""The norm of the result is 1 and its elements are the quotient, at any magnitude."""

import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import oracle
import pytest
from common import EMPTY, NORMS, exported_for, sample, scaled

from optax_unitscale import gradient_norms

# Two or three decades inside the normal range, so that normal samples stay in it.
MAGNITUDES = {
    "float16": [1e-2, 1.0, 300.0, 1e4],
    "bfloat16": [1e-35, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e20, 1e30, 1e36],
    "float32": [1e-35, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e20, 1e30, 1e36],
    "complex64": [1e-35, 1e-20, 1.0, 1e20, 1e36],
    "float64": [1e-300, 1e-200, 1e-160, 1.0, 1e153, 1e200, 1e300],
    "complex128": [1e-300, 1e-160, 1.0, 1e200, 1e300],
}
WIDE = ("float64", "complex128")


def check_group(results, gradients, norm):
    """Unit norm and true quotients, within a few units of the leaves' precision."""
    eps = max(oracle.epsilon(g.dtype) for g in gradients)
    results = [np.asarray(r) for r in results]
    # Half a unit for each rounding of an element, which for the worst of signs all add up; two
    # more for the sum, its root and its reciprocal.
    assert abs(oracle.norm_of(results, norm) - 1) < 4 * eps
    for result, gradient, quotient in zip(
        results, gradients, oracle.unit(gradients, norm), strict=True
    ):
        assert result.dtype == gradient.dtype
        assert result.shape == gradient.shape
        own = oracle.epsilon(gradient.dtype)
        tiny = float(jnp.finfo(gradient.dtype).tiny)
        wide = result.astype(np.complex128 if np.iscomplexobj(result) else np.float64)
        assert (np.abs(wide - quotient) <= 4 * own * np.abs(quotient) + tiny).all()


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_each_leaf_has_unit_norm_at_every_magnitude(norm, dtype, request):
    if dtype in WIDE:
        request.getfixturevalue("x64")
    for shape, magnitude in itertools.product([(), (300,), (64, 130)], MAGNITUDES[dtype]):
        gradient = sample(shape, dtype, magnitude)
        check_group([scaled(jnp.asarray(gradient), norm)], [gradient], norm)


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_the_whole_tree_has_unit_norm_at_every_magnitude(norm, dtype, request):
    if dtype in WIDE:
        request.getfixturevalue("x64")
    for magnitude in MAGNITUDES[dtype]:
        tree = [sample((40, 7), dtype, magnitude), sample((33,), dtype, magnitude, seed=1)]
        check_group(scaled([jnp.asarray(g) for g in tree], norm, scope="global"), tree, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_the_program_for_gpu_gives_unit_norm_at_every_magnitude(norm, dtype, request):
    if dtype in WIDE:
        request.getfixturevalue("x64")

    def both(tree):
        return scaled(tree, norm), scaled(tree, norm, scope="global")

    # CPU adds one element after the other where GPU has a tree.
    shapes = [(), (300,), (16, 20)]
    run = exported_for(both, [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes])
    for magnitude in MAGNITUDES[dtype]:
        tree = [sample(shape, dtype, magnitude) for shape in shapes]
        by_leaf, together = run(list(map(jnp.asarray, tree)))
        for result, gradient in zip(by_leaf, tree, strict=True):
            check_group([result], [gradient], norm)
        check_group(together, tree, norm)


# Over rows GPU has a way of its own.
@pytest.mark.parametrize(("platform", "axis"), [("cuda", 1), ("cuda", 0), ("tpu", 0)])
@pytest.mark.parametrize("norm", NORMS)
def test_the_program_for_gpu_is_exact_where_magnitudes_meet(norm, platform, axis):
    powers = (-35, -20, 0, 20, 36)
    rows = np.stack([sample((40,), "float32", 10.0**power) for power in powers])
    other = np.stack([sample((40,), "complex64", 10.0**power) for power in powers])
    edges = np.array([[0.0, 0.0], [np.nan, 1.0], [np.inf, 1e-30], [-np.inf, np.inf], [3.0, -4.0]])
    tree = [rows, rows.astype(jnp.bfloat16), other, edges.astype(np.float32)]
    turned = [jnp.asarray(x if axis else x.T) for x in tree]
    mixed = np.concatenate([sample((50,), "float32", 1e-30), sample((50,), "float32", 1e25)])
    turned.append(jnp.asarray(mixed))

    def update(tree):
        return scaled(tree, norm, axis=[axis] * 4 + [0])

    results = list(map(np.asarray, exported_for(update, turned, platform)(turned)))
    check_group([results.pop()], [mixed], norm)
    *ordinary, at_edges = [x if axis else x.T for x in results]
    for result, gradient in zip(ordinary, tree, strict=False):
        for row, slice_ in zip(result, gradient, strict=True):
            check_group([row], [slice_], norm)
    np.testing.assert_array_equal(at_edges[0], 0.0)
    assert np.isnan(at_edges[1:4]).all()
    check_group([at_edges[4]], [tree[3][4]], norm)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, 6), 0), ((41, 6), 0), ((7, 30, 6), 1), ((2, 3, 10, 6), (0, 1, 2)), ((9, 2, 6), (0, 1))],
)
def test_the_program_for_gpu_takes_columns_of_any_number_of_rows(shape, axis, norm):
    gradient = sample(shape, "bfloat16") * (10.0 ** np.array([-30, -3, 0, 5, 20, 30]))
    gradient = gradient.astype(jnp.bfloat16)
    gradient[0, ..., 2] = np.nan
    x = jnp.asarray(gradient)
    result = np.asarray(exported_for(lambda tree: scaled(tree, norm, axis=axis), x)(x))
    axes = np.atleast_1d(axis)
    kept = np.delete(shape, axes)
    pair = [np.moveaxis(y, axes, range(len(axes))).reshape(-1, *kept) for y in (result, gradient)]
    for index in np.ndindex(*kept):
        column, own = (y[:, *index] for y in pair)
        if np.isnan(own).any():
            assert np.isnan(column).all()
        else:
            check_group([column], [own], norm)


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
def test_every_slice_has_unit_norm_though_neighbours_differ_by_sixty_decades(norm):
    rows = 10.0 ** np.array([-33, -20, -7, 0, 9, 20, 33])
    gradient = (sample((7, 50), "float32") * rows[:, None]).astype(np.float32)
    result = scaled(jnp.asarray(gradient), norm, axis=1)
    for row, slice_ in zip(np.asarray(result), gradient, strict=True):
        check_group([row], [slice_], norm)


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
def test_a_tensor_may_hold_tiny_and_huge_elements_together(norm):
    gradient = np.array([1e-30, -1e25, 3e24, 1e-10, 2e18, -1e-37, 5e11], np.float32)
    check_group([scaled(jnp.asarray(gradient), norm)], [gradient], norm)


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", ["leaf", "global", {"a": "x", "b": "x", "c": "y"}])
def test_leaves_of_far_magnitudes_stand_beside_each_other(norm, scope):
    tree = {
        "a": sample((9, 5), "float32", 1e-28),
        "b": sample((45,), "float32", 1e28),
        "c": sample((3,), "float32", 1e-3),
    }
    result = scaled(jax.tree.map(jnp.asarray, tree), norm, scope=scope)
    groups = {"leaf": ["a", "b", "c"], "global": ["abc"]}.get(str(scope), ["ab", "c"])
    for group in groups:
        check_group([result[k] for k in group], [tree[k] for k in group], norm)


def test_two_thousand_bfloat16_leaves_of_one_element_have_unit_norm_together():
    tree = [jnp.full((1,), 0.01 * (1 + i % 7), jnp.bfloat16) for i in range(2000)]
    result = scaled(tree, "l2", scope="global")
    check_group(result, [np.asarray(x) for x in tree], "l2")


@pytest.mark.parametrize("shape", [(3000, 5000), (100, 100000)])
def test_millions_of_elements_have_unit_norm(shape):
    gradient = np.random.default_rng(0).random(shape, np.float32)
    result = np.asarray(scaled(jnp.asarray(gradient), "l2"), np.float64)
    assert abs(np.sqrt(np.sum(result**2)) - 1) < 1e-6


def test_a_hundred_million_elements_have_unit_norm():
    blocks = np.random.default_rng(0).random((100, 10**6), np.float32) * np.float32(1e25)

    def whole(array, norm):
        # Float64 holds the squares, and the sum of a block's to within 1e-15.
        order = {"l1": 1, "linf": np.inf}.get(norm, 2)
        norms = [np.linalg.norm(block.astype(np.float64), order) for block in array]
        return np.linalg.norm(norms, order) / (np.sqrt(array.size) if norm == "rms" else 1)

    for norm in NORMS:
        results = np.asarray(scaled(jnp.asarray(blocks.ravel()), norm)).reshape(blocks.shape)
        assert abs(whole(results, norm) - 1) < 1e-6
        by = whole(blocks, norm)
        for result, block in zip(results[::10], blocks[::10], strict=True):
            np.testing.assert_allclose(result, np.float64(block) / by, rtol=4 * 2.0**-23)


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [-110, -70, -30, 30, 70, 110])
def test_a_power_of_two_does_not_change_the_result(norm, power):
    gradient = sample((50, 20), "float32")
    before = np.asarray(scaled(jnp.asarray(gradient), norm))
    after = np.asarray(scaled(jnp.asarray(gradient * np.float32(2.0**power)), norm))
    np.testing.assert_array_equal(after, before)


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
def test_zero_updates_stay_zero(norm):
    tree = {"zero": jnp.zeros((3, 2)), "other": jnp.ones(2)}
    for scope in ("leaf", "global"):
        assert (np.asarray(scaled(tree, norm, scope=scope)["zero"]) == 0).all()


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_with_nan_or_inf_is_nan_throughout_and_alone(norm, bad):
    tree = {"bad": jnp.array([1.0, bad, 0.0]), "good": jnp.array([3.0, 4.0])}
    result = scaled(tree, norm)
    assert np.isnan(np.asarray(result["bad"])).all()
    check_group([result["good"]], [np.asarray(tree["good"])], norm)
    together = scaled(tree, norm, scope="global")
    assert all(np.isnan(np.asarray(x)).all() for x in jax.tree.leaves(together))
    rows = scaled(jnp.array([[1.0, bad], [3.0, 4.0]]), norm, axis=1)
    assert np.isnan(np.asarray(rows)[0]).all()
    assert np.isfinite(np.asarray(rows)[1]).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20])
def test_the_naive_quotient_fails_where_ours_holds(magnitude):
    gradient = sample((300,), "float32", magnitude)
    naive = np.asarray(jnp.asarray(gradient) / jnp.linalg.norm(jnp.asarray(gradient)))
    peer, _ = optax.normalize_by_update_norm().update(jnp.asarray(gradient), EMPTY)
    for wrong in (naive, np.asarray(peer)):
        assert not abs(np.linalg.norm(wrong) - 1) < 0.1
    check_group([scaled(jnp.asarray(gradient), "l2")], [gradient], "l2")


@pytest.mark.usefixtures("leaf_size")
def test_gradient_norms_are_exact_where_float32_squares_are_not():
    for magnitude in (1e-30, 1e-20, 1e20, 1e30):
        gradient = sample((300,), "float32", magnitude)
        for norm in NORMS:
            measured = float(gradient_norms(jnp.asarray(gradient), norm)["updates"])
            expected = float(oracle.norm_of([gradient], norm))
            assert abs(measured / expected - 1) < 4 * 2.0**-23


@pytest.mark.parametrize("norm", NORMS)
def test_what_xla_knows_of_a_gradient_changes_nothing(norm):
    known = list(itertools.product([(), (4,), (4, 16)], [0.0, 1e-30, 1.0, 1e25, 1e37]))

    def update(_):
        return scaled([jnp.full(shape, value) for shape, value in known], norm)

    for results in (jax.jit(update)(0), exported_for(update, 0)(0)):
        for result, (shape, value) in zip(results, known, strict=True):
            gradient = np.full(shape, value, np.float32)
            if value:
                check_group([result], [gradient], norm)
            else:
                np.testing.assert_array_equal(result, gradient)


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_groups_of_one_element_become_exactly_one_or_minus_one(norm, dtype):
    column = sample((500, 1), dtype, 1e-3)
    for leaf, axis in ((column, 1), (column.ravel(), ()), (column.T, 0)):
        result = np.asarray(scaled(jnp.asarray(leaf), norm, axis=axis))
        np.testing.assert_array_equal(result, np.sign(leaf))


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_negative_zero_stays_negative(shape):
    assert np.signbit(scaled(jnp.full(shape, -0.0), "l2")).all()


@pytest.mark.usefixtures("leaf_size")
@pytest.mark.parametrize("norm", NORMS)
def test_a_min_norm_at_the_end_of_the_range_gives_zeros_and_hides_no_nan(norm):
    tree = {"good": jnp.ones(4), "one": jnp.ones(()), "bad": jnp.array([1.0, jnp.nan])}
    result = scaled(tree, norm, min_norm=3e38)
    np.testing.assert_array_equal(np.asarray(result["good"]), 0)
    np.testing.assert_array_equal(np.asarray(result["one"]), 0)
    assert np.isnan(np.asarray(result["bad"])).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("run", [lambda f, x: f(x), lambda f, x: exported_for(f, x)(x)])
def test_a_nan_is_not_lost_in_a_leaf_of_any_size(norm, run):
    leaves = [np.ones(shape, np.float32) for shape in [3, 3000, 4096, (64, 64), 100000]]
    for x in leaves:
        x.ravel()[-2] = np.nan

    def update(leaves):
        return scaled(leaves, norm), list(gradient_norms(leaves, norm).values())

    for result, measured in zip(*run(update, leaves), strict=True):
        assert np.isnan(result).all()
        assert np.isnan(measured)
    rows = jnp.ones((100, 100)).at[3, 5].set(jnp.nan)
    assert np.isnan(jax.vmap(lambda x: scaled(x, norm))(rows)).sum() == 100


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("norm", NORMS)
def test_a_number_times_a_leaf_is_not_taken_apart(norm, axis):
    # XLA would multiply the number with the power of two of a sum.
    values = {1e15: 0, 1.01e15: 1e-36, 1e-9: 1e37, 1e-30: 1e36, 1e30: 1e-30, 2.0**49: 0}
    # Nor with the root of the number of elements that rms has.
    values |= {3e38: 1, 1e37: 1e-36}
    for shape, units in (((3, 4), 3), ((3, 1500), 16)):
        leaves = [jnp.full(shape, value, jnp.float32) for value in values.values()]

        def update(leaves):
            multiplied = [x * jnp.float32(by) for x, by in zip(leaves, values, strict=True)]
            return scaled(multiplied, norm, axis=axis)

        unit = scaled(jnp.ones(shape), norm, axis=axis)
        for results in (jax.jit(update)(leaves), exported_for(update, leaves)(leaves)):
            for result, value in zip(results, values.values(), strict=True):
                expected = unit if value else jnp.zeros(shape)
                np.testing.assert_allclose(result, expected, rtol=units * 2.0**-23)
