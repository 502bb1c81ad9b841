"""`orthogonalize` on one device: what becomes of singular values, magnitudes, dtypes and axes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from common import EMPTY, compilations, exported_for, sample
from jax import export

from optax_unitscale import Kernel
from optax_unitscale.coefficients import COEFFICIENTS
from optax_unitscale.orthogonal import orthogonalize

MATRIX = {"**": Kernel(0, 1)}
STACK = {"**": Kernel(1, 2)}
TRIPLES = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
SETS = [*COEFFICIENTS, TRIPLES]


def orthogonal(tree: Any, layers: Any = MATRIX, **options: Any) -> Any:
    return orthogonalize(layers=layers, **options).update(tree, EMPTY)[0]


def triples_of(coefficients, steps):
    own = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else coefficients
    return [own[min(i, len(own) - 1)] for i in range(steps)]


def expected(x, coefficients="polar_express", steps=5):
    """The same by singular values."""
    x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    if x.shape[0] > x.shape[1]:
        return expected(x.T, coefficients, steps).T
    if coefficients == "aol":
        x = x / np.sqrt(np.sum(np.abs(x @ x.conj().T), 1, keepdims=True))
        norm = 1.0
    else:
        norm = np.linalg.norm(x)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / norm
    for a, b, c in triples_of(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


def with_singular_values(values, columns, seed=0):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    v, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
    return (u * np.array(values)) @ v.T


@pytest.mark.parametrize("coefficients", SETS, ids=str)
def test_singular_values_become_the_polynomials_of_what_they_were(coefficients):
    sizes = [(6, 6), (5, 8), (8, 5), (1, 6), (6, 1), (1, 1)]
    tree = {str(size): sample(size, np.float32, seed=i) for i, size in enumerate(sizes)}
    tree["low rank"] = (sample((6, 2), np.float32) @ sample((2, 6), np.float32, seed=1)).astype(
        "f4"
    )
    steps = 2 if coefficients is TRIPLES else 6
    for name, x in orthogonal(tree, coefficients=coefficients, steps=steps).items():
        # Six steps raise what was rounded up to 1800 times, where a singular value is near 0.
        atol = 1e-3 if name == "low rank" else 3e-5
        np.testing.assert_allclose(x, expected(tree[name], coefficients, steps), atol=atol)


@pytest.mark.parametrize(
    ("coefficients", "steps", "bounds"),
    [
        ("polar_express", 5, (0.84, 1.13)),
        ("polar_express", 6, (0.993, 1.002)),
        ("polar_express", 7, (1 - 2e-5, 1 + 2e-5)),
        ("muon", 5, (0.47, 1.21)),
        ("aol", 5, (0.34, 1.06)),
    ],
)
def test_singular_values_from_a_thousandth_on_end_where_the_documentation_says(
    coefficients, steps, bounds
):
    values = np.geomspace(1, 1e-3, 40)
    # Rows of this one are orthogonal, which makes "aol" divide by all of them.
    x = with_singular_values(values / np.linalg.norm(values), 60)
    if coefficients != "aol":
        values = values * (values > 1e-3 * np.linalg.norm(values))
    result = orthogonal({"x": x.astype(np.float32)}, coefficients=coefficients, steps=steps)["x"]
    s = np.linalg.svd(np.asarray(result, np.float64), compute_uv=False)[: np.sum(values > 0)]
    assert bounds[0] <= s.min() <= s.max() <= bounds[1]


def test_with_many_steps_it_is_the_orthogonal_factor():
    x = sample((24, 16), np.float32)
    u, _, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(orthogonal({"x": x}, steps=10)["x"], u @ v, atol=3e-6)


def test_any_magnitude_gives_the_same_where_optax_fails_at_1e_10():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 1, (8, 12)) * rng.choice([-1, 1], (8, 12))
    stack = (x * 10.0 ** np.arange(-37, 39)[:, None, None]).astype(np.float32)
    results = orthogonal({"x": stack}, STACK)["x"]
    wanted = np.broadcast_to(expected(x), stack.shape)
    np.testing.assert_allclose(results, wanted, atol=2e-5)
    axes = {"x": optax.contrib.MuonDimensionNumbers()}
    naive = optax.contrib.scale_by_muon(beta=0.0, weight_dimension_numbers=axes)
    large = sample((64, 64), np.float32)
    small = {"x": jnp.asarray(large / np.linalg.norm(large) * np.float32(1e-10))}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates: Any = naive.update(small, naive.init(small))[0]
    s, own = (np.linalg.svd(y["x"], compute_uv=False) for y in (updates, orthogonal(small)))
    assert s.min() < 0.1 < 0.84 < own.min()


def test_zero_stays_zero_and_nan_or_an_infinity_is_nan_in_its_matrix_only():
    stack = sample((5, 4, 6), np.float32)
    stack[0] = 0
    stack[1, 2, 3], stack[2, 0, 0], stack[3, 1, 1] = np.nan, np.inf, -np.inf
    for coefficients in COEFFICIENTS:
        results = orthogonal({"x": stack}, STACK, coefficients=coefficients)["x"]
        assert not np.any(results[0])
        assert np.all(np.isnan(results[1:4]))
        np.testing.assert_allclose(results[4], expected(stack[4], coefficients), atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64", "float64", "complex128"])
def test_other_dtypes_are_rounded_once(dtype, request):
    if dtype in ("float64", "complex128"):
        request.getfixturevalue("x64")
    tree = {"x": jnp.asarray(sample((6, 9), dtype)), "y": jnp.asarray(sample((9, 6), dtype))}
    eps = float(jnp.finfo(dtype).eps)
    for name, x in orthogonal(tree).items():
        assert x.dtype == dtype
        x, y = (np.asarray(z, np.complex128) for z in (x, tree[name]))
        np.testing.assert_allclose(x, expected(y), atol=max(200 * eps, 2e-5) if eps < 1e-6 else eps)


def test_experts_heads_stacked_layers_and_blocks_are_matrices_of_their_own():
    heads = sample((2, 6, 3, 4), np.float32)  # (layers, width, heads, head_dim)
    groups = sample((3, 3, 4, 10), np.float32)  # (3, 3, in / 2, out) of two groups
    columns = sample((5, 2, 7), np.float32)  # (in, experts, out)
    layers = {
        "heads": Kernel(1, (2, 3)),
        "groups": Kernel((0, 1, 2), 3, blocks=2),
        "columns": Kernel(0, 2),
    }
    tree = {"heads": heads, "groups": groups, "columns": columns}
    found = {k: np.asarray(x) for k, x in orthogonal(tree, layers).items()}
    close = functools.partial(np.testing.assert_allclose, atol=3e-5)
    for i in range(2):
        close(found["heads"][i].reshape(6, 12), expected(heads[i].reshape(6, 12)))
        close(found["columns"][:, i], expected(columns[:, i]))
        own = slice(5 * i, 5 * i + 5)
        close(found["groups"][..., own].reshape(36, 5), expected(groups[..., own].reshape(36, 5)))


def test_what_is_no_kernel_passes_through():
    tree = {
        "embedding": np.ones((5, 3), np.float32),
        "bias": np.ones(3, np.float32),
        "none": None,
        "masked": optax.MaskedNode(),
        "float0": np.zeros((2, 2), jax.dtypes.float0),
        "empty": np.zeros((0, 3), np.float32),
        "kernel": np.eye(3, dtype=np.float32),
    }
    made = orthogonalize(steps=8)
    results: Any
    results, state = made.update(tree, made.init(tree))
    assert state == EMPTY
    assert jax.tree.structure(results) == jax.tree.structure(tree)
    for name in ("embedding", "bias", "float0", "empty"):
        np.testing.assert_array_equal(results[name], tree[name])
    np.testing.assert_allclose(results["kernel"], tree["kernel"], atol=1e-6)


def test_matrices_of_one_shape_share_a_loop_whichever_way_they_lie():
    tree = {str(i): jnp.ones((4, 6) if i % 2 else (6, 4)) for i in range(8)}
    text = jax.jit(orthogonal).lower(tree).compile().as_text() or ""
    # Over matrices, and over steps.
    assert text.count(" while(") == 2


def test_a_second_call_compiles_nothing_nor_does_an_equal_transformation():
    x = {"kernel": jnp.ones((3, 5))}
    orthogonalize().update(x, EMPTY)
    before = compilations()
    orthogonalize(coefficients="polar_express", steps=5).update(x, EMPTY)
    assert compilations() == before


def test_the_program_for_accelerators_is_as_good_as_bfloat16_and_that_for_cpu_as_float32():
    x = sample((2, 12, 20), np.float32)
    wanted = np.stack([expected(matrix) for matrix in x])
    results = exported_for(lambda x: orthogonal({"x": x}, STACK)["x"], x)(x)
    assert results.dtype == np.float32
    assert 1e-4 < np.abs(results - wanted).max() < 0.06
    with jax.default_matmul_precision("bfloat16"):
        np.testing.assert_allclose(orthogonal({"x": x}, STACK)["x"], wanted, atol=2e-5)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_derivatives_are_those_of_the_products_and_finite_at_zero(coefficients):
    def objective(x):
        return jnp.sum(orthogonal({"x": x}, coefficients=coefficients)["x"] ** 3)

    gradient = jax.jit(jax.grad(objective))
    assert np.all(np.isfinite(gradient(jnp.zeros((4, 6)))))
    x, direction = (sample((4, 6), np.float64, seed=seed) for seed in (0, 1))
    step = 1e-5 * direction
    ahead, behind = (np.sum(expected(x + s, coefficients) ** 3) for s in (step, -step))
    slope = np.sum(np.asarray(gradient(x.astype(np.float32)), np.float64) * direction)
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-3, atol=1e-3)


def test_axes_of_the_data_may_be_open_under_export_and_those_of_kernels_may_not():
    kernel, (n,) = jax.ShapeDtypeStruct((4, 6), np.float32), export.symbolic_shape("n")

    def step(kernel, x):
        return orthogonal({"x": jax.grad(lambda kernel: jnp.sum((x @ kernel) ** 3))(kernel)})["x"]

    exported = export.export(jax.jit(step))(kernel, jax.ShapeDtypeStruct((n, 4), np.float32))
    kernel, x = sample((4, 6), np.float32), sample((9, 4), np.float32)
    np.testing.assert_allclose(exported.call(kernel, x), step(kernel, x), atol=1e-5)
    stack = {"x": jax.ShapeDtypeStruct((n, 4, 6), np.float32)}
    with pytest.raises(ValueError, match=r"orthogonalize: .*shape \(n, 4, 6\), expected numbers"):
        export.export(jax.jit(lambda tree: orthogonal(tree, STACK)))(stack)


def test_it_works_inside_vmap_and_scan():
    x = sample((3, 4, 6), np.float32)
    results = jax.vmap(lambda x: orthogonal({"x": x})["x"])(x)
    _, scanned = jax.lax.scan(lambda c, x: (c, orthogonal({"x": x})["x"]), None, x)
    for result, again, matrix in zip(results, scanned, x, strict=True):
        np.testing.assert_allclose(result, expected(matrix), atol=2e-5)
        np.testing.assert_allclose(again, expected(matrix), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0, expected at least 1"),
        ({"steps": 2.5}, TypeError, "steps is 2.5, expected an int"),
        ({"coefficients": "newton"}, ValueError, r"'newton', expected one of \['polar_express'"),
        ({"coefficients": (1.5, -0.5, 0.0)}, TypeError, "a triple .* of numbers for each step"),
        ({"coefficients": TRIPLES}, ValueError, r"2 triples for 5 steps.*Give steps=2\."),
    ],
)
def test_coefficients_and_steps_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        orthogonalize(**options)


def test_steps_that_a_wrapper_traces_are_refused_and_static_ones_work():
    params = {"kernel": jnp.eye(3)}
    with pytest.raises(TypeError, match=r'static_args=\("steps",\)'):
        optax.inject_hyperparams(orthogonalize)(steps=5).init(params)
    made = optax.inject_hyperparams(orthogonalize, static_args=("steps",))(steps=8)
    results, _ = jax.jit(made.update)(params, made.init(params))
    np.testing.assert_allclose(results["kernel"], np.eye(3), atol=1e-6)


def test_what_no_rule_fits_is_an_error_at_init_and_integers_are_refused():
    with pytest.raises(ValueError, match=r"(?s)orthogonalize: .*mystery"):
        orthogonalize().init({"mystery": jnp.ones((2, 3, 4))})
    with pytest.raises(TypeError, match=r"orthogonalize: updates\['kernel'\] has dtype int32"):
        orthogonalize().update({"kernel": jnp.ones((2, 3), jnp.int32)}, EMPTY)
