"""What leaves are called, and trees that stand for the updates: looked up by name."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey, KeyPath, keystr, tree_flatten_with_path

__all__ = [
    "Path",
    "Prefix",
    "check_names",
    "flatten",
    "gradients",
    "is_childless",
    "is_tree",
    "show",
    "some",
]

IsLeaf = Callable[[Any], bool] | None  # As in `jax.tree.flatten`.
MOST_NAMES = 20
_VALUE = GetAttrKey("value")


class Path(NamedTuple):
    """Where a leaf is.

    `name` is such as "blocks/0/attn/kernel". A key with "/" in it is written as it is, as Haiku's
    "mlp/~/linear_0/w", and in quotes where another leaf would have the same name: "'a/b'/w".
    """

    keys: KeyPath
    names: tuple[str, ...]
    name: str


class Prefix:
    """A pytree prefix of the updates, such as labels: each entry stands for all leaves below it.

    It may also be flat, with names such as "dense/kernel" for keys. Errors call it `argument`, and
    end with the `hint`, which says what an entry may be.
    """

    def __init__(self, argument: str, tree: Any, is_leaf: IsLeaf = None, hint: str = ""):
        self._argument, self._hint = argument, hint
        flat = flatten(tree, is_leaf)
        self._paths = [path for path, _ in flat]
        self._values = {key: value for path, value in flat for key in (path.name, path.names)}

    def broadcast(self, caller: str, updates: Any, paths: Iterable[Path]) -> list[Any]:
        """The value for each of some leaves of the updates: the nearest, at the leaf or above."""
        self._check_entries(caller, updates)
        values = []
        for path in paths:
            found = [key for key in _lookups(path) if key in self._values]
            if not found:
                raise ValueError(
                    f"{caller}: {self._argument} has no entry for {show(path)}, expected a pytree "
                    f"prefix of the updates, got entries at {some(p.name for p in self._paths)}. "
                    f"Add the entry.{self._hint}"
                )
            values.append(self._values[found[0]])
        return values

    def _check_entries(self, caller: str, updates: Any) -> None:
        """Refuses an entry that stands for nothing in the updates: most likely it is misspelt."""
        leaves = [path for path, _ in flatten(updates, is_childless)]
        at = {key for path in leaves for key in (path.name, path.names)}
        at_or_above = {key for path in leaves for key in _lookups(path)}
        for path in self._paths:
            # It may stand for leaves that optax.masked left out, or for a part of them.
            if at_or_above.isdisjoint((path.name, path.names)) and at.isdisjoint(_lookups(path)):
                raise ValueError(
                    f"{caller}: {self._argument} has an entry at {path.name!r}, where the updates "
                    f"have none. They have {some(p.name for p in leaves)}.{self._hint}"
                )


def _lookups(path: Path) -> Iterator[str | tuple[str, ...]]:
    """A leaf's own keys in a prefix, flat and nested, then those of the subtrees that it is in."""
    names = path.names
    yield from (path.name, names)
    while names:
        above, slash, _ = names[-1].rpartition("/")  # Haiku's "mlp/~/linear_0" is in "mlp/~".
        names = (*names[:-1], above) if slash else names[:-1]
        yield from (names, "/".join(names))


def flatten(tree: Any, is_leaf: IsLeaf = None) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths."""
    flat, _ = tree_flatten_with_path(tree, is_leaf=is_leaf)
    boxes = _boxes(tree, is_leaf) if any(_VALUE in keys for keys, _ in flat) else set()
    shown = [
        tuple(key for i, key in enumerate(keys) if key != _VALUE or keys[:i] not in boxes)
        for keys, _ in flat
    ]
    every = [tuple(map(_name, keys)) for keys in shown]
    counts = collections.Counter("/".join(names) for names in every)
    leaves = []
    for (keys, value), names in zip(flat, every, strict=True):
        name = "/".join(names)
        if counts[name] > 1:
            name = "/".join(repr(part) if "/" in part else part for part in names)
        leaves.append((Path(keys, names, name or "updates"), value))
    return leaves


def _name(key: Any) -> str:
    if isinstance(key, DictKey) and isinstance(key.key, tuple):  # As flax.traverse_util makes.
        return "/".join(map(str, key.key))
    return keystr((key,), simple=True)


def _boxes(tree: Any, is_leaf: IsLeaf) -> set[KeyPath]:
    """Where nodes hold a `.value` and no more, as NNX's variables and Linen's boxes do."""
    # With empty subtrees: a node that holds one of these is no box.
    flat, _ = tree_flatten_with_path(tree, is_leaf=lambda x: is_childless(x, is_leaf))
    every = [(keys[:i], keys[: i + 1]) for keys, _ in flat for i in range(len(keys))]
    above = collections.Counter(node for node, _ in every)
    below = collections.Counter(child for _, child in every)
    return {node for node, child in every if child[-1] == _VALUE and above[node] == below[child]}


def gradients(caller: str, updates: Any) -> list[tuple[Path, Any]]:
    """The leaves as arrays, which they need not be outside `jax.jit`; integers are refused."""
    leaves = []
    for path, x in flatten(updates):
        # The gradient of an integer is float0, which holds no numbers.
        if getattr(x, "dtype", None) != jax.dtypes.float0:
            x = x if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else jnp.asarray(x)
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                raise TypeError(
                    f"{caller}: {show(path)} has dtype {x.dtype}, expected a floating or complex "
                    "dtype. Cast it, or leave it out with optax.masked."
                )
        leaves.append((path, x))
    return leaves


def check_names(caller: str, updates: Any, params: Any) -> None:
    """Refuses updates of leaves that the parameters have not."""
    known = {path.name for path, _ in flatten(params)}
    if unknown := [path.name for path, _ in flatten(updates) if path.name not in known]:
        raise ValueError(
            f"{caller}: the updates have {some(unknown)}, and params have no such leaves, but "
            f"{some(known)}. Pass the parameters that the updates are for."
        )


def is_childless(value: Any, is_leaf: IsLeaf = None) -> bool:
    """Whether a value is a leaf, or empty as None and what optax.masked puts in a leaf's place."""
    return jax.tree.structure(value, is_leaf).num_nodes == 1


def is_tree(value: Any) -> bool:
    """Whether a value is to be read as a tree: Equinox's models are trees that can be called."""
    # jax.tree_util.Partial is a function whose arguments are a tree.
    is_function = callable(value) and (isinstance(value, functools.partial) or is_childless(value))
    return not is_function


def show(path: Path) -> str:
    """Such as "updates['blocks'][0]", for an error."""
    return f"updates{keystr(path.keys)}"


def some(names: Iterable[str]) -> str:
    """The first few of many names, for an error."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{names[:MOST_NAMES]}{more}"
