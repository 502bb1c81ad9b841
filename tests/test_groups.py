"""Which elements share a norm, and what the leaves are called."""

import collections
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from common import scaled
from flax import core, nnx
from flax import linen as nn

from optax_unitscale import gradient_norms, stacked, unit_scale

# A sum, its root, its reciprocal and the product.
RTOL = 4 * 2.0**-23


def sample(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check_same(result: Any, expected: Any) -> None:
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=RTOL)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A pytree with attributes, as an Equinox module is."""

    dense: Any


Layer = collections.namedtuple("Layer", ["kernel", "bias"])


class NNXModel(nnx.Module):
    """One dense layer."""

    def __init__(self):
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


class LinenModel(nn.Module):
    """One dense layer, its kernel boxed or not."""

    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        """The layer's output."""
        init = nn.initializers.ones
        init = nn.with_partitioning(init, (None, "model")) if self.boxed else init
        return nn.Dense(3, kernel_init=init, name="dense")(x)


def nnx_gradient() -> Any:
    return nnx.grad(lambda model: jnp.sum(model.dense(jnp.ones((1, 2)))))(NNXModel())


def linen_params(boxed: bool) -> Any:
    return LinenModel(boxed).init(jax.random.key(0), jnp.ones((1, 2)))["params"]


def plain() -> dict[str, jax.Array]:
    return {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}


TREES = {
    "dict": lambda: {"dense": plain()},
    "frozen dict": lambda: core.freeze({"dense": plain()}),
    "namedtuple": lambda: {"dense": Layer(**plain())},
    "dataclass": lambda: Module(Layer(**plain())),
    "Linen": lambda: linen_params(boxed=False),
    "Linen, boxed": lambda: linen_params(boxed=True),
    "NNX gradient": nnx_gradient,
    "NNX state": lambda: nnx.state(NNXModel(), nnx.Param),
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_a_leaf_has_one_name_in_every_library(make):
    tree, seen = make(), {}

    def axis(path, leaf):
        seen[path] = leaf.shape
        return -1 if path == "dense/kernel" else None

    norms = gradient_norms(tree, axis=axis)
    assert seen == {"dense/bias": (3,), "dense/kernel": (2, 3)}
    shapes = {name: norm.shape for name, norm in norms.items()}
    assert shapes == {"dense/bias": (), "dense/kernel": (2,)}
    whole = {part: np.linalg.norm(norm) for part, norm in zip("bk", norms.values(), strict=True)}
    # Labels may be written in the tree's own classes, or in plain dicts whatever those are.
    own_labels = jax.tree.map(lambda leaf: "bk"[leaf.ndim - 1], tree)
    check_same(gradient_norms(tree, scope=own_labels), whole)
    plain_labels = {"dense": {"kernel": "k", "bias": "b"}}
    check_same(gradient_norms(tree, scope=lambda _: plain_labels), whole)
    assert jax.tree.structure(scaled(tree)) == jax.tree.structure(tree)


def test_positions_in_lists_tuples_and_integer_keys_are_numbers():
    ones = jnp.ones(2)
    tree = {"list": [ones, {"x": ones}], "tuple": (ones, Layer(ones, [ones])), "keys": {3: ones}}
    assert set(gradient_norms(tree)) == {
        *("list/0", "list/1/x", "tuple/0", "tuple/1/kernel", "tuple/1/bias/0", "keys/3")
    }
    model = nnx.Sequential(NNXModel(), nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
    assert set(gradient_norms(nnx.state(model, nnx.Param))) == {
        *("layers/0/dense/bias", "layers/0/dense/kernel", "layers/1/bias", "layers/1/kernel")
    }
    assert list(gradient_norms(ones)) == ["updates"]


TREE = {"head": sample(4, seed=1), "layer": {"bias": sample(3, seed=2), "kernel": sample(3, 5)}}


def by_path(updates: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: "hl"[path[0].key == "layer"], updates)


@pytest.mark.parametrize(
    "labels",
    [
        {"head": "h", "layer": "l"},
        {"head": 1, "layer": {"bias": 2, "kernel": 2}},
        by_path,
        lambda updates: {"head": "h", "layer": dict.fromkeys(updates["layer"], "l")},
    ],
    ids=["prefix", "numbers", "callable", "callable prefix"],
)
def test_leaves_of_equal_label_share_a_norm(labels):
    result = scaled(TREE, scope=labels)
    for part in ("head", "layer"):
        exact = oracle.unit(jax.tree.leaves(TREE[part]), "l2")
        check_same(jax.tree.leaves(result[part]), [quotient.astype(float) for quotient in exact])


@pytest.mark.parametrize("labels", [{"head": "h", "layer": "l"}, by_path])
def test_labels_mean_what_they_mean_in_optax_partition(labels):
    whole = unit_scale(scope="global")
    partition = optax.partition({"h": whole, "l": whole}, labels)
    expected, _ = partition.update(TREE, partition.init(TREE))
    check_same(scaled(TREE, scope=labels), expected)


def test_one_label_for_all_is_the_global_scope_and_one_for_each_the_leaf_scope():
    check_same(scaled(TREE, scope=lambda _: "all"), scaled(TREE, scope="global"))
    each = {"head": 0, "layer": {"bias": 1, "kernel": 2}}
    check_same(scaled(TREE, scope=each), scaled(TREE, scope="leaf"))


@pytest.mark.parametrize(
    ("axis", "axes"),
    [
        *[(None, (0, 1, 2)), (1, (1,)), (-1, (2,)), ((2, 0), (0, 2)), ((-3, 1), (0, 1)), ((), ())],
        *[({"w": (1, 2)}, (1, 2)), (lambda path, leaf: leaf.shape.index(3), (0,))],
    ],
)
def test_the_norm_runs_over_the_axes_and_the_others_stand_apart(axis, axes):
    x = sample(3, 4, 5)
    size = np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=axes, keepdims=True))
    check_same(scaled({"w": x}, axis=axis), {"w": x / size})
    norms = gradient_norms({"w": x}, axis=axis)
    assert norms["w"].shape == np.squeeze(size, axes).shape
    check_same(norms, {"w": np.squeeze(size, axes)})


@pytest.mark.parametrize(
    "axis",
    [
        {"head": None, "layer": {"bias": (), "kernel": 1}},
        lambda path, leaf: tuple(range("layer" in path, leaf.ndim)),
    ],
    ids=["prefix", "callable"],
)
def test_a_neurons_kernel_row_and_bias_share_a_norm(axis):
    result = scaled(TREE, scope={"head": "h", "layer": "l"}, axis=axis)
    bias, kernel = TREE["layer"]["bias"], TREE["layer"]["kernel"]
    joined = np.concatenate([bias[:, None], kernel], axis=1).astype(np.float64)
    exact = joined / np.linalg.norm(joined, axis=1, keepdims=True)
    check_same(result["layer"], {"bias": exact[:, 0], "kernel": exact[:, 1:]})
    check_same(result["head"], oracle.unit([TREE["head"]], "l2")[0].astype(float))


def test_masked_leaves_need_neither_labels_nor_axes_and_may_have_them():
    tree = {"a": jnp.array([3.0, 4.0]), "b": optax.MaskedNode(), "c": None}
    for labels in ({"a": "x"}, {"a": "x", "b": "y", "c": "y"}, {"a": "x", "b": {"kernel": "y"}}):
        result = scaled(tree, scope=labels, axis=jax.tree.map(lambda _: -1, labels))
        check_same(result, tree | {"a": np.array([0.6, 0.8])})


AC = collections.namedtuple("AC", ["value", "policy"])


def test_a_field_that_a_user_named_value_keeps_its_name():
    tree = AC(jnp.array([3.0, 4.0]), AC(jnp.array([6.0, 8.0]), None))
    assert set(gradient_norms(tree)) == {"value", "policy/value"}
    labels = AC("critic", "actor")
    measured = gradient_norms(tree, scope=labels)
    assert {name: float(norm) for name, norm in measured.items()} == {"critic": 5, "actor": 10}
    masked = AC(optax.MaskedNode(), jnp.array([6.0, 8.0]))
    assert set(gradient_norms(masked, scope=labels)) == {"actor"}


def test_a_named_tuple_of_axes_is_a_tree_of_them():
    tree = Layer(jnp.asarray(sample(2, 3)), jnp.asarray(sample(2, 3, seed=1)))
    result = scaled(tree, axis=Layer(0, 1))
    check_same(result, Layer(scaled(tree.kernel, axis=0), scaled(tree.bias, axis=1)))


def test_numpy_integers_are_axes_like_any_other():
    x = jnp.asarray(sample(2, 3, 4))
    for axis, same in [(np.int64(0), 0), ((2, np.int32(0)), (0, 2)), (0, 0)]:
        check_same(scaled(x, axis=axis), scaled(x, axis=same))


def test_a_model_that_can_be_called_is_a_tree_of_labels_and_of_axes():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    gradient = eqx.filter(model, eqx.is_inexact_array)
    labels = jax.tree.map(lambda x: "kernels" if x.ndim == 2 else "biases", gradient)
    check_same(scaled(gradient, scope=labels), scaled(gradient, scope=lambda _: labels))
    axes = jax.tree.map(lambda x: x.ndim - 1, gradient)
    check_same(scaled(gradient, axis=axes), scaled(gradient, axis=lambda path, x: x.ndim - 1))


def test_labels_and_axes_may_be_flat_with_the_names_that_gradient_norms_gives():
    for tree in (TREE, {"mlp/~/linear_0": {"w": sample(2, 3), "b": sample(3)}}):
        names = list(gradient_norms(tree))
        flat = {name: name for name in names}
        assert list(gradient_norms(tree, scope=flat)) == names
        check_same(scaled(tree, scope=flat), scaled(tree))
        by_row = dict.fromkeys(names, -1)
        check_same(scaled(tree, axis=by_row), scaled(tree, axis=-1))


def test_names_that_hold_a_slash_are_quoted_where_they_would_collide():
    tree = {"a/b": sample(2), "a": {"b": sample(3)}, "c/d": {"e": sample(4)}}
    assert set(gradient_norms(tree)) == {"'a/b'", "a/b", "c/d/e"}


def test_leaves_of_one_module_share_a_norm_in_scope_layer():
    for tree in (TREE, {"mlp/~/linear_0": TREE["layer"], "head": {"w": TREE["head"]}}):
        result = scaled(tree, scope="layer")
        for part in ("layer", "mlp/~/linear_0"):
            if part in tree:
                exact = oracle.unit(jax.tree.leaves(tree[part]), "l2")
                check_same(jax.tree.leaves(result[part]), [x.astype(float) for x in exact])
    assert set(gradient_norms(TREE, scope="layer")) == {"updates", "layer"}
    norms = gradient_norms(nnx.state(NNXModel(), nnx.Param), scope="layer")
    assert list(norms) == ["dense"]
    assert list(gradient_norms([sample(2, 3)], scope="layer")) == ["updates"]
    # Flat, as what Keras and `flax.traverse_util.flatten_dict` give.
    flat = {"a/dense/kernel": sample(3, 5), "a/dense/bias": sample(5), "b/kernel": sample(2)}
    for separator in "/.":
        tree = {name.replace("/", separator): x for name, x in flat.items()}
        assert [*gradient_norms(tree, scope="layer")] == [f"a{separator}dense", "b"]
    tree = {tuple(name.split("/")): x for name, x in flat.items()}
    assert [*gradient_norms(tree, scope="layer")] == ["a/dense", "b"]
    assert [*gradient_norms(tree, scope={"a": "x", "b": "y"})] == ["x", "y"]
    stack = {"blocks": {"kernel": sample(2, 3, 4), "bias": sample(2, 4)}, "head": {"w": sample(3)}}
    norms = gradient_norms(stack, scope="layer", axis=stacked("blocks/**"))
    assert {name: norm.shape for name, norm in norms.items()} == {"blocks": (2,), "head": ()}


def test_stacked_layers_have_their_own_norms_along_the_axis_that_is_named():
    tree = {"decoder": {"layers": {"kernel": sample(3, 2, 4)}}, "head": sample(4)}
    norms = gradient_norms(tree, axis=stacked("**/layers/**", axis=1))
    kernel = tree["decoder"]["layers"]["kernel"].astype(np.float64)
    expected = np.sqrt(np.sum(kernel**2, (0, 2)))
    check_same(norms["decoder/layers/kernel"], expected)
    assert norms["head"].shape == ()
    masked = tree | {"decoder": optax.MaskedNode()}
    assert list(gradient_norms(masked, axis=stacked("decoder/**", axis=1))) == ["head"]


def test_the_nearest_entry_counts_in_whichever_spelling():
    x = np.full((2, 2), 3.0, np.float32)
    tree = {"dense": {"kernel": x, "bias": x}}
    mixed = {"dense": None, "dense/kernel": 0}
    norms = gradient_norms(tree, axis=mixed)
    assert {name: norm.shape for name, norm in norms.items()} == {
        "dense/bias": (),
        "dense/kernel": (2,),
    }
    assert set(gradient_norms(tree, scope={"dense": "x", "dense/kernel": "y"})) == {"x", "y"}


def test_entries_stand_for_part_of_a_name_and_for_the_subtree_of_that_name_first():
    tree = {"mlp/~/linear": {"w": sample(2, 3)}, "mlp": {"~": sample(2, 4)}, "head": sample(5)}
    for labels in ({"mlp": "m", "head": "h"}, {"mlp/~": "m", "head": "h"}):
        assert list(gradient_norms(tree, scope=labels)) == ["h", "m"]
    axis = {"mlp/~/linear": None, "mlp/~/linear/w": 0, "mlp": None, "head": None}
    norms = gradient_norms(tree, axis=axis)
    assert [norm.shape for norm in norms.values()] == [(), (), (3,)]
    nested = {"a/b": {"w": sample(2)}, "a": {"b": {"v": sample(3)}}}
    norms = gradient_norms(nested, "linf", scope={"a/b": "x", "a": {"b": "y"}})
    expected = {"x": nested["a/b"]["w"], "y": nested["a"]["b"]["v"]}
    check_same(norms, {name: np.abs(x).max() for name, x in expected.items()})


def test_leaves_without_elements_and_masked_ones_need_no_entry_and_keep_their_names():
    x, left_out = jnp.array([3.0, 4.0]), optax.MaskedNode()
    tree = {"x": x, "empty": jnp.zeros((0, 2)), "count": np.zeros(3, jax.dtypes.float0)}
    check_same(gradient_norms(tree, scope={"x": "label"}), {"label": np.float32(5)})
    check_same(gradient_norms(tree, axis={"x": 0}), {"x": np.float32(5)})
    masked = {"blocks": {"kernel": left_out, "bias": left_out}}
    for tree in ({**masked, "head": x}, masked):
        norms = gradient_norms(tree, axis=stacked("blocks/kernel"))
        check_same(norms, {"head": np.float32(5)} if "head" in tree else {})


def test_a_model_of_nones_is_a_tree_of_axes_and_quoted_names_are_labels():
    model = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    check_same(scaled(model, axis=jax.tree.map(lambda x: None, model)), scaled(model))
    x = sample(2)
    for tree in ({"a/b": x, "a": {"b": x}}, {"a/b": {"w": x}, "a": {"b": {"w": x}}}):
        names = list(gradient_norms(tree))
        assert list(gradient_norms(tree, scope={name: name for name in names})) == names
