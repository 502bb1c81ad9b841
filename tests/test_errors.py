"""What a wrong argument is told: which function, which leaf, what was expected, what to do."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import EMPTY, scaled

from optax_unitscale import gradient_norms, stacked, unit_scale


def sample(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


ONE, TWO = {"a": sample(2, 3)}, {"a": sample(2, 3), "b": sample(4)}


def refuse(error: type[Exception], text: str, tree: Any, **options: Any) -> None:
    """Both functions raise, by name, eagerly and while the caller's jit traces."""
    text = ".*".join(map(re.escape, text.split("...")))
    with pytest.raises(error, match="^unit_scale: " + text):
        scaled(tree, **options)
    with pytest.raises(error, match="^unit_scale: " + text):
        jax.jit(lambda tree: scaled(tree, **options)).lower(tree)
    with pytest.raises(error, match="^gradient_norms: " + text):
        gradient_norms(tree, **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"norm": "l3"}, ValueError, "norm is 'l3', expected one of l2, rms, l1, linf."),
        (
            {"scope": "layers"},
            ValueError,
            "scope is 'layers', expected 'leaf', 'layer', 'global'",
        ),
        (
            {"scope": None},
            ValueError,
            "scope is None, expected 'leaf', 'layer', 'global', a",
        ),
        ({"scope": 0}, ValueError, "scope is 0, expected...name it in static_args=('scope',)"),
    ],
    ids=["norm", "scope", "none", "number"],
)
def test_an_argument_that_fits_no_tree_is_refused_before_there_is_one(options, error, text):
    refuse(error, text, ONE, **options)
    with pytest.raises(error, match=re.escape(text.split("...")[0])):
        unit_scale(**options)


def test_an_array_as_axis_is_refused_and_inject_hyperparams_mentioned():
    text = "axis is an array, expected static integers. Under optax.inject_hyperparams name it in"
    refuse(TypeError, text, ONE, axis=jnp.array(0))
    with pytest.raises(TypeError, match=re.escape(text) + r" static_args=\('axis',\)"):
        optax.inject_hyperparams(unit_scale)(axis=0).init(ONE)


def test_labels_that_miss_a_leaf_are_refused():
    text = "scope has no entry for updates['b'], expected a pytree prefix...got entries at ['a']."
    refuse(ValueError, text, TWO, scope={"a": "x"})
    refuse(ValueError, text, TWO, scope=lambda _: {"a": "x", "b": None})


def test_labels_that_stand_for_no_leaf_are_refused():
    text = "scope has an entry at 'head/bais', where the updates have none. They have ['a', 'b']."
    labels = {"a": "x", "b": "x", "head": {"bais": "x"}}
    refuse(ValueError, text, TWO, scope=labels)
    refuse(ValueError, text, TWO, scope=lambda _: labels)


def test_a_label_that_cannot_be_hashed_is_refused():
    text = "scope gives updates['a'] the label {'x'} of type set, expected something hashable"
    refuse(TypeError, text, ONE, scope=lambda _: {"a": {"x"}})
    refuse(TypeError, text, ONE, scope={"a": {"x"}})


def test_a_function_that_inject_hyperparams_called_itself_is_refused_with_the_cure():
    inject = optax.inject_hyperparams(unit_scale)

    def ranks(updates: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim, updates)

    with pytest.raises(ValueError, match=r"scope is .*static_args=\('scope',\)"):
        inject(scope=ranks, min_norm=optax.constant_schedule(0.0)).init(TWO)
    with pytest.raises(TypeError, match=r"stacked: called with .*static_args=\('axis',\)"):
        inject(axis=stacked("a")).init(TWO)
    named = optax.inject_hyperparams(unit_scale, static_args=("scope", "axis"))
    tx = named(scope=ranks, axis=lambda path, x: None, min_norm=0.0)
    check_unit_norms(tx.update(TWO, tx.init(TWO))[0])


def check_unit_norms(tree: Any) -> None:
    for x in jax.tree.leaves(tree):
        assert abs(np.linalg.norm(np.asarray(x)) - 1) < 1e-6


def test_one_number_is_no_label_for_a_whole_tree_but_for_a_tree_of_one_leaf():
    refuse(ValueError, "scope is 0, expected", TWO, scope=lambda _: 0)
    check_unit_norms(scaled(sample(3), scope=lambda x: x.ndim))


def test_layers_of_a_list_of_arrays_are_refused():
    text = "scope is 'layer', the default of unit_sgd, but the updates are a list of arrays, which"
    refuse(ValueError, text, [sample(2, 3), sample(3)], scope="layer")


def test_a_pattern_of_stacked_layers_that_fits_nothing_is_refused():
    text = "stacked has ['blocks/**'], which match no leaf. The leaves are ['a']; '*' stands for"
    refuse(ValueError, text, ONE, axis=stacked("blocks/**"))
    with pytest.raises(ValueError, match=r"stacked: 'a' of shape \(2, 3\) has no axis 2\. Change"):
        scaled(ONE, axis=stacked("*", axis=2))


def test_axes_that_miss_a_leaf_are_refused():
    text = "axis has no entry for updates['b'], expected a pytree prefix...Add the entry. One"
    refuse(ValueError, text, TWO, axis={"a": 0})


def test_axes_that_stand_for_no_leaf_are_refused():
    text = "axis has an entry at 'kernal', where the updates have none. They have ['a']."
    refuse(ValueError, text, ONE, axis={"a": 0, "kernal": 0})
    many = {f"layer{i}": sample(2) for i in range(50)}
    text = "axis has an entry at 'kernal'...They have ['layer0', ...'layer26'] and 30 more."
    refuse(ValueError, text, many, axis={"kernal": 0} | dict.fromkeys(many, 0))
    text = "axis has an entry at '0'...['a']...an int or a tuple; a list is for several"
    refuse(ValueError, text, ONE, axis=[0, 1])


def test_a_mesh_axis_that_nothing_around_the_call_has_is_refused():
    for axis_name in ("data", lambda path, leaf: ("data",)):
        with pytest.raises(NameError, match="unbound axis name: data"):
            scaled(ONE, axis_name=axis_name)


def test_axes_that_are_not_integers_are_refused():
    text = "axis gives {!r} for updates['a'] of shape (2, 3), expected None, an int, or a tuple"
    for wrong in ("0", 0.5, True, [0], (0, None), (True,)):
        refuse(TypeError, text.format(wrong), ONE, axis=lambda path, x, wrong=wrong: wrong)
    for wrong in ("0", 0.5, True):
        refuse(TypeError, text.format(wrong), ONE, axis={"a": wrong})


def test_what_equals_an_axis_but_is_none_is_refused_after_the_axis_was_taken():
    for axis in (0, 1):
        scaled(ONE, axis=axis)
    for wrong in (True, False, 0.0, 1.0):
        refuse(TypeError, f"axis gives {wrong} for updates['a']", ONE, axis=wrong)


def test_axes_that_a_leaf_does_not_have_or_twice_are_refused():
    where = "axis gives {} for updates['a'] of shape (2, 3): "
    refuse(ValueError, where.format(2) + "axis 2 is out of bounds", ONE, axis={"a": 2})
    refuse(ValueError, where.format((0, -3)) + "axis -3 is out", ONE, axis=(0, -3))
    refuse(ValueError, where.format((0, -2)) + "repeated axis. Name axes", ONE, axis=(0, -2))
    refuse(ValueError, "axis gives 0 for updates['a'] of shape ()", {"a": jnp.float32(1)}, axis=0)
    assert scaled({"a": jnp.float32(-2)}, axis=()) == {"a": -1}


def test_kept_axes_that_differ_within_a_group_are_refused():
    text = "updates['b'] of shape (4,) keeps axes of shape (), but updates['a']...keeps (3,)"
    text += "...change axis, or give them different labels."
    refuse(ValueError, text, TWO, axis=0, scope="global")
    refuse(ValueError, text, TWO, axis=0, scope={"a": "x", "b": "x"})


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [(np.array([1, 2], np.int32), "int32"), (np.uint8(3), "uint8"), (7, "int32"), (True, "bool")],
)
def test_a_leaf_that_is_no_gradient_is_refused_by_its_path_with_the_cure(leaf, dtype):
    text = f"updates['layer'][1] has dtype {dtype}, expected a floating or complex dtype. "
    text += "Cast it, or leave it out with optax.masked."
    refuse(TypeError, text, {"layer": [sample(2), leaf]})
    refuse(TypeError, "updates['layer'][0] has dtype key<fry>", {"layer": [jax.random.key(0)]})


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
@pytest.mark.parametrize("floor", [-1.0, np.nan, np.inf, -np.inf])
def test_min_norm_outside_its_range_is_refused(floor, kind):
    text = rf"unit_scale: min_norm is {floor}, expected 0 to 3\.4e\+38"
    with pytest.raises(ValueError, match=text):
        unit_scale(min_norm=kind(floor))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_min_norm_that_is_no_scalar_is_refused(kind):
    floor = kind(np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match=r"min_norm has shape \(2, 1\), expected a scalar"):
        unit_scale(min_norm=floor)
    with pytest.raises(ValueError, match=r"min_norm has shape \(2, 1\), expected a scalar"):
        jax.jit(lambda m: scaled(jnp.ones(3), min_norm=m))(floor)


@pytest.mark.parametrize("floor", [None, "1", 1 + 2j, True, [0.5, None]], ids=str)
def test_min_norm_that_is_no_real_number_is_refused(floor):
    with pytest.raises(TypeError, match=r"unit_scale: min_norm is .*, expected a real number"):
        unit_scale(min_norm=floor)


def test_a_schedule_as_min_norm_is_refused_and_inject_hyperparams_mentioned():
    schedule: Any = optax.constant_schedule(1.0)
    with pytest.raises(TypeError, match=r"number\. A schedule goes through optax\.inject_hy"):
        unit_scale(min_norm=schedule)
    assert optax.inject_hyperparams(unit_scale)(min_norm=schedule).init(ONE)


def test_a_whole_number_is_a_min_norm_however_large():
    x = jnp.array([3.0, 4.0])
    for floor in (10**12, np.int64(10**12), 2**63, 10**20, np.longdouble(1e12), np.float16(6e4)):
        result = unit_scale(min_norm=floor).update(x, EMPTY)[0]
        np.testing.assert_allclose(np.asarray(result), [3 / float(floor), 4 / float(floor)], 1e-6)
