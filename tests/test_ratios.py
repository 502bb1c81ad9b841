"""Steps are as long beside their parameters as NumPy says, at any magnitude."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_unitscale import stacked, step_ratios, unit_scale

MAGNITUDES = [1e-37, 1e-25, 1e-10, 1.0, 1e10, 1e25, 1e36]
# Two norms, each of a sum, its root and its scale, and the division.
RTOL = 8 * 2.0**-23


@pytest.mark.parametrize("n", [4, 5000], ids=["small", "large"])
def test_ratios_are_exact_where_either_norm_is_out_of_range(n):
    rng = np.random.default_rng(0)
    pairs = {f"{a} {b}": (a, b) for a in MAGNITUDES for b in MAGNITUDES}
    steps, params = (
        {name: (rng.uniform(1, 2, n) * pair[i]).astype(np.float32) for name, pair in pairs.items()}
        for i in range(2)
    )
    ratios = step_ratios(steps, params)
    for name, ratio in ratios.items():
        wide = [np.linalg.norm(tree[name].astype(np.float64)) for tree in (steps, params)]
        expected = wide[0] / wide[1]
        if expected < 2.0**-126 or expected > 3.4e38:
            expected = 0.0 if expected < 1 else np.inf
        assert ratio.dtype == jnp.float32
        np.testing.assert_allclose(ratio, expected, rtol=RTOL, err_msg=name)


def test_zero_over_zero_is_zero_and_nan_shows():
    zero, one, nan = (np.full(3, x, np.float32) for x in (0, 1, np.nan))
    steps = {"still": zero, "born": one, "stays": zero, "nan": nan, "of nan": zero}
    params = {"still": one, "born": zero, "stays": zero, "nan": zero, "of nan": nan}
    expected = {"still": 0, "born": np.inf, "stays": 0, "nan": np.nan, "of nan": np.nan}
    found = {name: float(ratio) for name, ratio in step_ratios(steps, params).items()}
    np.testing.assert_equal(found, expected)


def test_slices_and_layers_have_ratios_of_their_own_in_any_dtype():
    updates = {"blocks": {"kernel": jnp.ones((3, 2, 2), jnp.bfloat16)}}
    params = {"blocks": {"kernel": jnp.arange(1.0, 4)[:, None, None] * jnp.ones((3, 2, 2))}}
    by_slice = step_ratios(updates, params, axis=stacked("blocks/**"))
    np.testing.assert_allclose(by_slice["blocks/kernel"], [1, 1 / 2, 1 / 3], rtol=RTOL)
    (by_layer,) = step_ratios(updates, params, scope="layer").items()
    np.testing.assert_allclose(by_layer[1], np.sqrt(12 / 56), rtol=RTOL)
    assert by_layer[0] == "blocks"


def test_models_are_taken_whole_and_what_has_no_step_is_left_out():
    model = eqx.nn.MLP(3, 2, 4, 0, key=jax.random.key(0))
    updates = eqx.filter(model, eqx.is_inexact_array)
    updates = eqx.tree_at(lambda model: model.layers[0].bias, updates, None)
    ratios = step_ratios(updates, model)
    assert {name: float(ratio) for name, ratio in ratios.items()} == {"layers/0/weight": 1.0}

    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = nnx.state(linear, nnx.Param)
    optimizer = optax.chain(unit_scale(), optax.sgd(0.1))
    gradient = nnx.grad(lambda model: model(jnp.ones(3)).sum())(linear)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    length = np.linalg.norm(np.asarray(linear.kernel[...], np.float64))
    ratios = step_ratios(updates, params)
    np.testing.assert_allclose(ratios["kernel"], 0.1 / length, rtol=RTOL)


def test_steps_without_a_parameter_of_their_shape_are_all_named():
    steps = {"a": np.ones(3), "b": np.ones(3), "c": np.float32(1)}
    params = {"a": np.ones(3), "b": np.ones(2)}
    text = r"^step_ratios: params do not fit the updates: \['b \(3,\): \(2,\)', 'c \(\): none'\], "
    with pytest.raises(ValueError, match=text):
        step_ratios(jax.tree.map(np.float32, steps), params)
