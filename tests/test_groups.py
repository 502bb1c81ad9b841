"""Which elements share a norm, what the leaves are called, and what a wrong argument is told."""

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import core, nnx
from flax import linen as nn

from optax_unitscale import gradient_norms, unit_scale

EMPTY = optax.EmptyState()
# A sum, its root, its reciprocal and the product.
RTOL = 4 * 2.0**-23


def scaled(tree: Any, **options: Any) -> Any:
    return unit_scale(**options).update(tree, EMPTY)[0]


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
    for labels in ({"a": "x"}, {"a": "x", "b": "y", "c": "y"}):
        result = scaled(tree, scope=labels, axis=dict.fromkeys(labels, -1))
        check_same(result, tree | {"a": np.array([0.6, 0.8])})


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
        ({"scope": "layer"}, ValueError, "scope is 'layer', expected 'leaf', 'global', a pytree"),
        ({"axis": {"a": np.arange(2)}}, TypeError, "scope, axis and...hashable...'numpy.ndarray'"),
        ({"scope": {"a": {"x"}}}, TypeError, "scope, axis and...hashable...'set'. Pass a function"),
    ],
    ids=["norm", "scope", "axis", "labels"],
)
def test_an_argument_that_fits_no_tree_is_refused_before_there_is_one(options, error, text):
    refuse(error, text, ONE, **options)
    with pytest.raises(error, match=text.split("...")[0]):
        unit_scale(**options)


def test_an_array_as_axis_is_refused_and_inject_hyperparams_mentioned():
    text = "axis is an array, expected static integers. Under optax.inject_hyperparams name it in"
    refuse(TypeError, text, ONE, axis=jnp.array(0))
    with pytest.raises(TypeError, match=re.escape(text) + r" static_args=\('axis',\)"):
        optax.inject_hyperparams(unit_scale)(axis=0).init(ONE)


def test_labels_that_miss_a_leaf_are_refused():
    text = "scope has no label for updates['b'], expected a pytree prefix...got labels at ['a']."
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


def test_axes_that_miss_a_leaf_are_refused():
    text = "axis has no entry for updates['b'], expected a pytree prefix...Add the entry; None"
    refuse(ValueError, text, TWO, axis={"a": 0})


def test_axes_that_stand_for_no_leaf_are_refused():
    text = "axis has an entry at 'kernal', where the updates have none. They have ['a']."
    refuse(ValueError, text, ONE, axis={"a": 0, "kernal": 0})


@pytest.mark.parametrize("nonsense", ["0", 0.5, True, [0], (0, None), (True,)], ids=str)
def test_axes_that_are_not_integers_are_refused(nonsense):
    text = f"axis gives {nonsense!r} for updates['a'], expected None, an int, or a tuple of ints."
    refuse(TypeError, text, ONE, axis=lambda path, leaf: nonsense)
    if not isinstance(nonsense, (list, tuple)):
        refuse(TypeError, text, ONE, axis={"a": nonsense})


def test_axes_that_a_leaf_does_not_have_are_refused():
    text = "axis {} is out of range for updates['a'] of shape (2, 3), expected -2 to 1. A callable"
    refuse(ValueError, text.format(2), ONE, axis={"a": 2})
    refuse(ValueError, text.format(-3), ONE, axis=(0, -3))


def test_an_axis_named_twice_is_refused():
    text = "axis (0, -2) names an axis twice for updates['a'] of shape (2, 3). Name each axis once."
    refuse(ValueError, text, ONE, axis=(0, -2))


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
