"""`scale_by_shape` in stacks, by dimension numbers; Optax's contract; what it refuses."""

import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import EMPTY, compilations, factors, shaped, shapes
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Axes

from optax_unitscale import Kernel, layers_of, scale_by_shape, unit_scale


def first_update(tx: optax.GradientTransformation, tree: Any) -> Any:
    return tx.update(tree, tx.init(tree), tree)[0]


def check_same(tree: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def stacked(updates: Any) -> Any:
    """Layers along axis 0 below "blocks"; else the defaults."""

    def numbers(path, x):
        if path[0].key != "blocks":
            return None
        return Axes((), -1) if x.ndim == 2 else Axes(-2, -1)

    return jax.tree_util.tree_map_with_path(numbers, updates)


STACK: Any = {
    "blocks": shapes(kernel=(3, 16, 64), bias=(3, 64)),
    "head": shapes(kernel=(64, 16), bias=(16,)),
}
STACK_FACTORS = {"blocks/kernel": 2, "blocks/bias": 8, "head/kernel": 0.5, "head/bias": 4}


def test_stacked_layers_are_batches_where_dimension_numbers_say_so():
    assert factors(STACK, dimension_numbers=stacked) == pytest.approx(STACK_FACTORS)
    prefix = {"blocks": {"kernel": Axes([1], (2,)), "bias": Axes((), (-1,))}, "head": None}
    assert factors(STACK, dimension_numbers=prefix) == pytest.approx(STACK_FACTORS)


def test_vmap_over_stacked_layers_needs_no_dimension_numbers():
    found = jax.vmap(shaped)(STACK["blocks"])
    expected = shaped(STACK, dimension_numbers=stacked)["blocks"]
    check_same(found, expected)


def test_dimension_numbers_stand_for_all_below_them():
    weights = {"a": np.ones((2, 8)), "b": [np.ones((9, 36))]}
    assert factors(weights, dimension_numbers=Axes()) == pytest.approx({"a": 2, "b/0": 2})
    turned = {"a": Axes(1, 0), "b": Axes(-1, -2)}
    assert factors(weights, dimension_numbers=turned) == pytest.approx({"a": 0.5, "b/0": 0.5})
    # As optax.contrib.muon takes them, of several axes each.
    several = factors(np.ones((2, 3, 6, 4)), dimension_numbers=Axes((0, 1), (2, 3)))
    assert several == pytest.approx({"": 2})


def test_a_tied_embedding_can_be_read_as_the_output_layer():
    table = {"tokens": shapes(embedding=(36, 9))}
    assert factors(table, dimension_numbers=Axes(1, 0)) == pytest.approx({"tokens/embedding": 2})


def test_layers_say_fans_and_blocks_and_dimension_numbers_win():
    """A depthwise convolution's outputs see 9 inputs each; the gates of a cell lie side by side."""
    tree = {
        "conv": shapes(kernel=(3, 3, 1, 512)),
        "qkv": shapes(kernel=(64, 3, 4, 4)),
        "tokens": shapes(embedding=(9, 4)),
        "head": shapes(kernel=(4, 16)),
    }
    overrides = {
        "conv/*": Kernel((0, 1, 2), 3, 512),
        "**/qkv/kernel": Kernel(0, (2, 3)),
    }
    expected = {"conv/kernel": 1 / 3, "qkv/kernel": 0.5, "tokens/embedding": 2, "head/kernel": 2}
    assert factors(tree, layers=overrides) == pytest.approx(expected)
    assert factors(tree, layers=layers_of(tree, overrides)) == pytest.approx(expected)
    # Also by flat names, as gradient_norms has them.
    numbers = {"conv": None, "qkv": None, "tokens/embedding": Axes(0, 1), "head": Axes(1, 0)}
    turned = factors(tree, layers=overrides, dimension_numbers=numbers)
    assert turned == pytest.approx({**expected, "tokens/embedding": 2 / 3, "head/kernel": 0.5})


def test_an_equinox_model_of_dimension_numbers_is_a_tree_and_no_callable():
    mlp = eqx.nn.MLP(4, 9, 4, 0, key=jax.random.key(0))
    model = jax.tree.map(jnp.ones_like, eqx.filter(mlp, eqx.is_inexact_array))
    numbers = jax.tree.map(lambda x: Axes((), tuple(range(x.ndim))), model)
    assert shaped(model).layers[0].weight[0, 0] == 1.5
    assert shaped(model, dimension_numbers=numbers).layers[0].weight[0, 0] == 6


def test_batch_axes_may_be_open_under_export_and_fans_may_not():
    (n,) = export.symbolic_shape("n")

    def exported(*shape: Any) -> Any:
        tree = {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}
        layers: Any = {"kernel": Kernel(-2, -1)}
        return export.export(jax.jit(lambda tree: shaped(tree, layers=layers)))(tree)

    check_same(
        exported(n, 4, 16).call(shapes(kernel=(2, 4, 16))), {"kernel": np.full((2, 4, 16), 2)}
    )
    text = "updates['kernel'] of shape (4, n) has 4 inputs and n outputs, expected numbers."
    with pytest.raises(ValueError, match=re.escape(f"scale_by_shape: {text}")):
        exported(4, n)


def refuse(error: type[Exception], text: str, tree: Any, **options: Any) -> None:
    """Eagerly, and while the caller's jit traces."""
    pattern = "^scale_by_shape: " + ".*".join(map(re.escape, text.split("...")))
    with pytest.raises(error, match=pattern):
        shaped(tree, **options)
    with pytest.raises(error, match=pattern):
        jax.jit(lambda tree: shaped(tree, **options)).lower(tree)


def test_leaves_that_could_be_several_things_are_an_error_at_init_too():
    tree = {"conv": shapes(kernel=(3, 3, 1, 512))}
    text = "the name and the shape of these leaves do not show what they are:\n  conv/kernel (3, "
    refuse(ValueError, text, tree)
    with pytest.raises(ValueError, match=r"\nWrite, for example, layers=layers_of\(params, \{"):
        scale_by_shape().init(tree)


ONE: Any = shapes(kernel=(2, 3))


def test_an_unknown_rule_is_refused():
    text = "rule is 'mup', expected one of spectral, muon, consistent_rms, sign."
    refuse(ValueError, text, ONE, rule="mup")


def test_dimension_numbers_that_are_none_are_refused():
    text = "dimension_numbers gives {} for updates['kernel'] of shape (2, 3), expected optax.contr"
    letter: Any = "0"
    for wrong, shown in [(0, "0"), (Axes(letter, 1), "MuonDi..."), (Axes(True, 1), "MuonDi...")]:
        refuse(TypeError, text.format(shown), ONE, dimension_numbers={"kernel": wrong})
    refuse(TypeError, text.format("0"), ONE, dimension_numbers=lambda _: 0)


def test_dimension_numbers_that_do_not_fit_are_refused():
    text = "dimension_numbers gives MuonDimensionNumbers(reduction_axis={}, output_axis={}) for "
    text += "updates['kernel'] of shape (2, 3), expected axes that it has, each once. A callable"
    for reduction, output in [((0,), (2,)), ((-3,), (1,)), ((0,), (0, 1)), ((1,), (-1,))]:
        refuse(
            ValueError,
            text.format(reduction, output),
            ONE,
            dimension_numbers=Axes(reduction, output),
        )


def test_dimension_numbers_that_miss_a_leaf_or_the_tree_are_refused():
    two = {"a": ONE["kernel"], "kernel": ONE["kernel"]}
    text = "dimension_numbers has no entry for updates['kernel'], expected a pytree prefix...None"
    refuse(ValueError, text, two, dimension_numbers={"a": Axes()})
    text = "dimension_numbers has an entry at 'kernal', where the updates have none. They have"
    refuse(ValueError, text, ONE, dimension_numbers={"kernel": None, "kernal": Axes()})


def test_integers_are_refused_by_their_path_with_the_cure():
    text = "updates['step'] has dtype int32, expected a floating or complex dtype. Cast it, or"
    refuse(TypeError, text, {"step": np.int32(1)})


MIXED: Any = {
    "half": {"kernel": np.ones((4, 16), np.float16)},
    "brain": {"kernel": np.ones((4, 16), jnp.bfloat16)},
    "complex": {"kernel": np.full((4, 16), 1 + 1j, np.complex64)},
    "single": {"kernel": np.ones((4, 16), np.float32), "bias": None},
    "masked": optax.MaskedNode(),
    "no gradient": np.zeros(3, jax.dtypes.float0),
    "empty": np.ones((3, 0, 2), np.float32),
    "number": 2.5,
}


def test_dtypes_are_kept_and_what_holds_nothing_passes():
    result = shaped(MIXED)
    assert jax.tree.structure(result) == jax.tree.structure(MIXED)
    for name in ("half", "brain", "complex", "single"):
        before, after = MIXED[name]["kernel"], result[name]["kernel"]
        # As lax.cond and lax.scan compare them.
        assert jax.typeof(after) == jax.typeof(jnp.asarray(before))
        np.testing.assert_array_equal(np.asarray(after), 2 * before)
    assert result["no gradient"].dtype == jax.dtypes.float0
    assert result["empty"].shape == (3, 0, 2)
    assert result["number"] == 2.5


@pytest.mark.parametrize("jit", [False, True])
def test_there_is_no_state_extra_arguments_are_taken_and_a_second_step_compiles_nothing(jit):
    def step(tree, state, value):
        # Made anew each time, with a callable made anew.
        tx = scale_by_shape(dimension_numbers=lambda updates: stacked(updates))
        return tx.update(tree, state, tree, value=value)

    step = jax.jit(step) if jit else step
    _, state = step(STACK, scale_by_shape(dimension_numbers=stacked).init(STACK), 1.0)
    before = compilations()
    updates, state = step(STACK, state, 2.0)
    assert compilations() == before
    assert state == EMPTY
    check_same(updates, shaped(STACK, dimension_numbers=stacked))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_leaves_keep_their_sharding_and_have_the_factor_of_the_whole(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2, devices=jax.devices("cpu"))
    specs: Any = {"blocks": {"kernel": P(None, "b", "a"), "bias": P(None, "a")}}
    specs["head"] = {"kernel": P(("a", "b")), "bias": P()}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        tree = jax.device_put(STACK, shardings)
        results = [shaped(tree, dimension_numbers=stacked)]
        results.append(jax.jit(lambda tree: shaped(tree, dimension_numbers=stacked))(tree))
    expected = shaped(STACK, dimension_numbers=stacked)
    for result in results:
        check_same(result, expected)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), result, shardings)
        assert all(jax.tree.leaves(same))


def test_inject_hyperparams_leaves_the_arguments_alone():
    make = optax.inject_hyperparams(scale_by_shape, static_args="dimension_numbers")
    for rule in ("spectral", "muon"):
        tx: Any = make(rule, dimension_numbers=stacked)
        updates, state = jax.jit(tx.update)(STACK, tx.init(STACK))
        assert state.hyperparams == {}
        check_same(updates, shaped(STACK, rule, dimension_numbers=stacked))


def test_what_masked_leaves_out_is_not_looked_at():
    odd: Any = {**STACK, "odd": np.ones((2, 3, 5), np.float32)}
    mask = {"blocks": True, "head": {"kernel": False, "bias": True}, "odd": False}
    tx = optax.masked(scale_by_shape(dimension_numbers=stacked), mask)
    updates = first_update(tx, odd)
    expected = shaped(STACK, dimension_numbers=stacked)
    expected["head"]["kernel"], expected["odd"] = STACK["head"]["kernel"], odd["odd"]
    check_same(updates, expected)


def test_partition_gives_each_layer_scions_factor():
    """First layer on images, hidden layer, output layer, from 2 to 8 to 8 to 4 features."""
    rng = np.random.default_rng(0)
    tree = {
        name: {"kernel": np.float32(rng.normal(size=shape)), "bias": np.ones(shape[1], np.float32)}
        for name, shape in {"first": (2, 8), "hidden": (8, 8), "last": (8, 4)}.items()
    }
    tx = optax.partition(
        {
            "first": optax.chain(unit_scale(), scale_by_shape("muon")),
            "hidden": optax.chain(unit_scale(), scale_by_shape()),
            "last": optax.chain(optax.scale_by_sign(), scale_by_shape("sign")),
        },
        {name: name for name in tree},
    )
    updates = first_update(tx, tree)
    norms = {name: float(np.linalg.norm(leaves["kernel"])) for name, leaves in updates.items()}
    # √(8/2), √(8/8), and 32 elements of 1/8.
    assert norms == pytest.approx({"first": 2, "hidden": 1, "last": math.sqrt(32) / 8}, rel=1e-6)


def test_depth_is_a_mask_and_a_scale():
    depth = 4
    layers: Any = {f"block{i}": shapes(kernel=(8, 8)) for i in range(depth)}
    tree = {**layers, "head": shapes(kernel=(8, 2))}
    branches = {name: name.startswith("block") for name in tree}
    tx = optax.chain(scale_by_shape(), optax.masked(optax.scale(1 / depth), branches))
    updates = first_update(tx, tree)
    found = {name: float(leaves["kernel"][0, 0]) for name, leaves in updates.items()}
    assert found == pytest.approx({**dict.fromkeys(layers, 0.25), "head": 0.5})
