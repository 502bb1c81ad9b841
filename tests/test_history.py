"""Recorded norms become one line a layer, and each step's ratios to its median layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_unitscale import (
    gradient_norms,
    norm_ratios,
    record_norms,
    recorded_norms,
    unit_scale,
)

PARAMS = {"a": jnp.ones((2, 2)), "b": jnp.ones(9)}


def test_ratios_of_what_is_recorded_step_by_step():
    optimizer = optax.chain(record_norms(), unit_scale())
    state, history = optimizer.init(PARAMS), []
    for scale in (1.0, 3.0):
        gradients = {"a": PARAMS["a"] * scale, "b": PARAMS["b"] * 2 * scale}
        _, state = optimizer.update(gradients, state)
        history.append(recorded_norms(state, PARAMS))
    # Norms of 2 and 6, then thrice these, have medians of 4 and 12.
    ratios = norm_ratios(history)
    np.testing.assert_allclose(ratios["a"], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(ratios["b"], [1.5, 1.5], rtol=1e-6)
    # Nothing waits on how the steps are handed over.
    np.testing.assert_equal(norm_ratios(iter(history)), ratios)


def test_a_scan_gives_the_same_as_a_list():
    def step(_, scale):
        return None, gradient_norms({"a": PARAMS["a"] * scale, "b": PARAMS["b"]}, axis=0)

    scales = np.array([1.0, 1e-20, 0.0], np.float32)
    stacked = jax.lax.scan(step, None, scales)[1]
    listed = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)]
    assert list(norm_ratios(stacked)) == ["a[0]", "a[1]", "b"]
    np.testing.assert_equal(norm_ratios(stacked), norm_ratios(listed))


def test_what_nnx_holds_is_read():
    # As Flax NNX holds what optax.snapshot keeps.
    held = {"a": nnx.Variable(jnp.array(1.0)), "b": nnx.Variable(jnp.array(3.0))}
    np.testing.assert_equal(norm_ratios([held]), {"a": np.array([0.5]), "b": np.array([1.5])})


def test_recorded_norms_outlive_the_donated_state():
    optimizer = optax.chain(record_norms(), optax.sgd(0.1))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, scale):
        gradients = {"a": PARAMS["a"], "b": PARAMS["b"] * scale}
        return optimizer.update(gradients, state)[1]

    state, history = optimizer.init(PARAMS), []
    for scale in (1.0, 3.0, 9.0):
        state = step(state, scale)
        history.append(recorded_norms(state, PARAMS))
    ratios = norm_ratios(history)
    np.testing.assert_allclose(ratios["b"] / ratios["a"], [1.5, 4.5, 13.5], rtol=1e-6)


def test_zero_and_what_is_not_finite_have_no_part_in_the_median():
    norms = {"a": 0.0, "b": 2.0, "c": None, "d": np.float32(6.0), "e": np.inf, "f": np.nan, "g": 3}
    ratios = {name: ratio.item() for name, ratio in norm_ratios([norms]).items()}
    nan = np.nan
    expected = {"a": 0, "b": 2 / 3, "c": nan, "d": 2.0, "e": nan, "f": nan, "g": 1.0}
    np.testing.assert_equal(ratios, expected)


def test_steps_without_a_norm_above_zero_have_no_ratios():
    ratios = norm_ratios([{"a": 0.0, "b": None}, {"a": 1.0, "b": 1.0}])
    np.testing.assert_equal(ratios, {"a": np.array([np.nan, 1]), "b": np.array([np.nan, 1])})


def test_layers_are_in_the_order_in_which_people_count():
    names = ["layers/10/b", "layers/2/b", "head", "layers/2/a", "layers/2"]
    expected = ["head", "layers/2", "layers/2/a", "layers/2/b", "layers/10/b"]
    assert list(norm_ratios([dict.fromkeys(names, 1.0)])) == expected


def test_an_array_is_a_line_a_slice_up_to_128_and_else_its_range():
    norms: dict[str, Any] = {"a": np.ones((2, 64)), "b": np.arange(1.0, 130), "c": [1.0, None]}
    ratios = {name: ratio.item() for name, ratio in norm_ratios([norms]).items()}
    slices = [f"a[{i},{j}]" for i in range(2) for j in range(64)]
    assert list(ratios) == [*slices, "b[min]", "b[median]", "b[max]", "c[0]", "c[1]"]
    assert [ratios[f"b[{kind}]"] for kind in ("min", "median", "max")] == [1, 65, 129]
    assert np.isnan(ratios["c[1]"])


def test_one_slice_of_many_that_is_nan_shows():
    ratios = norm_ratios([{"a": np.where(np.arange(200) == 7, np.nan, 1.0), "b": 1.0}])
    assert all(np.isnan(ratios[f"a[{kind}]"]).all() for kind in ("min", "median", "max"))


MANY = dict.fromkeys(map(str, range(100)), 1.0)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "there are no norms, expected at least one norm for at least one step"),
        ([{}], "there are no norms"),
        ({"a": np.zeros(0)}, "there are no norms"),
        ({"a": 1.0}, r"history\['a'\] is one number, expected one for each step. Put"),
        ({"a": np.ones(3), "b": np.ones(2)}, r"arrays of \[2, 3\] steps, expected the same number"),
        ([{"a": 1.0}, {"a": np.ones(2)}], r"'a' has shapes \[\(\), \(2,\)\] at different steps"),
        (
            [{"a": 1.0}, {"b": 1.0}],
            r"steps 0 and 1 .*: only one of the two has \['a', 'b'\]\. Pass",
        ),
        ([MANY, {"0": 1.0}], "only one of the two has .* and 79 more"),
        (None, "history has type NoneType, expected a list of a dict"),
        ([{"a": 1.0}, None], "step 1 has type NoneType, expected a dict of norms by name"),
        ([{"a": {"b": 1.0}}], "'a' has type dict, .* Flatten dicts of dicts to names such as"),
        ([{"a": 1.0, 0: 1.0}], r"step 0 has norms named \[0\], expected strings"),
        ({("a", "b"): np.ones(2)}, r"history has norms named \[\('a', 'b'\)\], expected strings"),
    ],
)
def test_a_history_that_is_none_is_refused(history, message):
    with pytest.raises((TypeError, ValueError), match=f"^norm_ratios: .*{message}"):
        norm_ratios(history)
