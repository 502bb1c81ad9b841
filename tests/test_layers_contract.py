"""What `layers_of` refuses, overrides, layers as a value, and their table."""

import re
from typing import Any, cast

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import line_of, readings_of, said, shapes, short
from flax import linen, nnx

from optax_unitscale import Kernel, Layers, layers_of, layers_table, scale_by_shape, unit_muon
from optax_unitscale.layers import layers_in

REFUSED: dict[str, Any] = {
    "fused": {"qkv": shapes(kernel=(64, 3, 4, 16))},
    "fused, first": {"qkv_einsum": shapes(w=(3, 4, 64, 16)), "kv": shapes(kernel=(2, 64, 64))},
    "depthwise": {"Conv_0": shapes(kernel=(3, 3, 1, 64))},
    "matrix": {"code": shapes(book=(16, 64))},
    "stack": {"ConvNeXt_0": shapes(kernel=(3, 16, 64))},
    "stacked attention": {n: shapes(kernel=(3, 16, 16)) for n in ("query", "key", "value", "out")},
    "stacked bias": shapes(bias=(3, 64)),
    "stacked gain": shapes(scale=(3, 64)),
    "stacked tokens": shapes(embedding=(3, 11, 16)),
    "Equinox or PyTorch": shapes(weight=(64, 16)),
    "one projection": {"out": shapes(kernel=(3, 32, 16))},
    "transposed": {"ConvTranspose_0": shapes(kernel=(3, 3, 4, 8))},
    "rank": {"Conv_0": shapes(kernel=(3, 64))},
    "stacked convolution": {"conv1": shapes(kernel=(2, 3, 4, 8), bias=(2, 8))},
}


@pytest.mark.parametrize("tree", REFUSED.values(), ids=REFUSED)
def test_what_can_be_several_things_is_refused(tree):
    params = {**tree, "known": shapes(kernel=(2, 2))}
    with pytest.raises(ValueError, match=r"^f: the name and the shape of these leaves") as error:
        layers_in("f", None, params)
    for name in layers_of(tree, {"**": "vector"}):
        assert f"\n  {name} (" in str(error.value)
    assert "known" not in str(error.value)
    # The line that it says to write is one that can be run.
    context = {"layers_of": layers_of, "Kernel": Kernel, "params": params}
    known = eval(line_of(error), context)
    assert len(known) == len(layers_of(params, {"**": "vector"}))
    # So is each other reading.
    for other in readings_of(error):
        assert layers_of(params, {**other, "**": "vector"}) != layers_of(params, {"**": "vector"})


def test_lists_without_names_are_refused_with_the_names_of_keras():
    arrays = [np.ones((3, 4)), np.ones(4), np.ones((4, 5))]
    with pytest.raises(
        ValueError, match=r"0 \(3, 4\)\n  2 \(4, 5\)\n[^`]*v.path: v.value"
    ) as error:
        layers_of(arrays)
    line = '{"0": Kernel(inputs=0, outputs=1), "2": Kernel(inputs=0, outputs=1)}'
    assert line_of(error) == f"layers_of(params, {line})"
    overrides = {"0": Kernel(inputs=0, outputs=1), "2": Kernel(inputs=0, outputs=1)}
    assert said(arrays, overrides) == {"0": "0 > 1", "2": "0 > 1"}


ONE: Any = {"a": shapes(kernel=(6, 4), bias=(4,))}


WRONG_AXES = [(0, 2), (0, 0), ((0, 1), -1), ((), ()), (True, 0), (0, 1, 3), (0, 1, 0)]


@pytest.mark.parametrize("wrong", [*(Kernel(*axes) for axes in WRONG_AXES), "vectors", (0, 1)])
def test_overrides_that_do_not_fit_are_refused(wrong):
    is_kernel = isinstance(wrong, Kernel)
    expected = "axes that a/kernel of shape (6, 4) has" if is_kernel else "a Kernel, 'embedding' or"
    text = re.escape(f"layers_of: overrides has {wrong!r} for '**/kernel', expected {expected}")
    with pytest.raises(ValueError if is_kernel else TypeError, match=text):
        layers_of(ONE, {"**/kernel": wrong})


def test_overrides_that_are_no_dict_are_refused():
    for wrong in (Kernel(0, 1), "a/**"):
        text = re.escape(f"layers_of: overrides is {wrong!r}, expected a dict from patterns")
        with pytest.raises(TypeError, match=text):
            layers_of(ONE, cast(Any, wrong))


@pytest.mark.parametrize("wrong", [["a/**"], {"a/**": "0"}, 0])
def test_stacks_that_are_no_patterns_are_refused(wrong):
    with pytest.raises(TypeError, match=re.escape(f"layers_of: stacked is {wrong!r}, expected a")):
        layers_of(ONE, stacked=wrong)


def test_what_holds_no_arrays_is_refused():
    for wrong in (linen.Dense(4), hk.transform(lambda x: x)):
        for function in (layers_of, layers_table, unit_muon(0.1).init):
            with pytest.raises(TypeError, match=r"holds no arrays.*layers_of\(params\)"):
                function(cast(Any, wrong))
    assert not layers_of({})
    assert not layers_of(eqx.nn.Lambda(jax.nn.relu))


def test_other_callers_name_the_argument_that_they_have():
    text = re.escape(
        "scale_by_shape: layers has ['b/**'], which match no leaf. The leaves are ['a/"
    )
    with pytest.raises(ValueError, match=text):
        scale_by_shape(layers={"b/**": "vector"}).init(ONE)


def test_patterns_that_fit_nothing_or_what_is_no_stack_are_refused():
    for argument in ("overrides", "stacked"):
        text = re.escape(f"{argument} has ['b/**'], which match no leaf. The leaves are ['a/")
        options: Any = {argument: {"b/**": 0}}
        with pytest.raises(ValueError, match=text):
            layers_of(ONE, **options)
    text = "stacked has axis 0 for 'a/**', expected an axis of one size in ['a/bias (4,)', 'a/k"
    with pytest.raises(ValueError, match=re.escape(text)):
        layers_of(ONE, stacked="a/**")


def test_layers_are_a_value_that_wrappers_leave_alone():
    layers = layers_of(ONE)
    assert layers == layers_of(ONE) == {"a/kernel": layers["a/kernel"], "a/bias": layers["a/bias"]}
    assert hash(layers) == hash(layers_of(ONE))
    seen: list[Any] = []

    def transformation(rate, layers):
        seen.append(layers)
        return optax.scale(rate)

    optax.inject_hyperparams(transformation)(0.1, layers).init(ONE)
    assert all(isinstance(one, Layers) for one in seen)
    # Leaves that are missing, masked or have no gradient need no entry, and others do.
    part = {"a": {"kernel": ONE["a"]["kernel"], "bias": optax.MaskedNode()}, "n": np.arange(3)}
    assert [path.name for path, *_ in layers_in("f", layers, part)] == ["a/kernel"]
    overrides: Any = {"**/kernel": Kernel(1, 0), "**/bias": "vector"}
    assert [short(layer) for *_, layer in layers_in("f", overrides, part)] == ["1 > 0"]
    text = (
        r"f: layers does not fit, it has \[.* for a/kernel \(2, 6, 4\).*, 'no entry for b \(3,\)'"
    )
    with pytest.raises(ValueError, match=text):
        layers_in("f", layers, {"a": shapes(kernel=(2, 6, 4)), "b": np.ones(3)})
    model: Any = eqx.nn.PReLU()
    with pytest.raises(TypeError, match=r"f: layers is a PReLU, expected what layers_of\(model\)"):
        layers_in("f", model, ONE)


def two_zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype).at[1].set(1)


def test_the_table_says_what_each_leaf_gets_and_which_kernels_are_zero():
    tree: Any = {"blocks": shapes(kernel=(3, 4, 16), bias=(3, 16)), "e": shapes(embedding=(9, 4))}
    table = str(layers_table(layers_of(tree, stacked="blocks/**")))
    assert [re.split("  +", line) for line in table.splitlines()[2:]] == [
        ["blocks/bias", "(3, 16)", "vector", "1, batch 0", "a tenth of unit norm", "0.4"],
        ["blocks/kernel", "(3, 4, 16)", "kernel", "1 → 2, batch 0", "orthogonal", "2"],
        ["e/embedding", "(9, 4)", "embedding", "0 → 1", "unit rows", "2"],
    ]
    experts = nnx.Einsum("BED,EDF->BEF", (3, 4, 9), kernel_init=two_zeros, rngs=nnx.Rngs(0))
    *_, last, caption = str(layers_table(experts)).splitlines()
    assert re.split("  +", last)[-2:] == ["1.5", "zero at init: 2 of 3"]
    assert caption == "zero at init: keep_norm passes it through"


@pytest.mark.parametrize("library", ["equinox", "nnx"])
def test_an_override_with_inputs_for_outputs_is_refused_where_a_module_says_the_opposite(library):
    linear = {
        "equinox": lambda: eqx.nn.Linear(8, 24, key=jax.random.key(0)),
        "nnx": lambda: nnx.Linear(8, 24, rngs=nnx.Rngs(0)),
    }[library]()
    right, swapped = Kernel(1, 0, blocks=3), Kernel(0, 1, blocks=2)
    if library == "nnx":
        right, swapped = Kernel(0, 1, blocks=3), Kernel(1, 0, blocks=2)
    (name,) = layers_of(linear).keys() - {"bias"}
    assert layers_of(linear, {name: right})[name].blocks == 3
    with pytest.raises(ValueError, match=rf"inputs for outputs in \['{name}'\].*swap them"):
        layers_of(linear, {name: swapped})
