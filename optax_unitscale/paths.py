"""What leaves are called, and trees that stand for the updates: looked up by name."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, KeyPath, keystr, tree_flatten_with_path

__all__ = [
    "Path",
    "Prefix",
    "flatten",
    "gradients",
    "is_childless",
    "is_float0",
    "is_tree",
    "join",
    "show",
    "some",
]

MOST_NAMES = 20
_VALUE = (GetAttrKey("value"),)


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

    It may also be flat, with names such as "dense/kernel" for keys.

    Args:
      argument: what users call it, for errors.
      tree: the prefix.
      is_leaf: as in `jax.tree.flatten`.
      hint: what an entry may be, for errors.
    """

    def __init__(
        self,
        argument: str,
        tree: Any,
        is_leaf: Callable[[Any], bool] | None = None,
        hint: str = "",
    ):
        self._argument, self._hint = argument, hint
        flat = flatten(tree, is_leaf)
        self._paths = [path for path, _ in flat]
        self._values: dict[str | tuple[str, ...], Any] = {}
        for path, value in flat:
            self._values[path.name] = self._values[path.names] = value

    def broadcast(self, caller: str, updates: Any, paths: Iterable[Path]) -> list[Any]:
        """The value for each of some leaves of the updates: the nearest, at the leaf or above."""
        self._check_entries(caller, updates)
        values = []
        for path in paths:
            nearest = next((key for key in _lookups(path) if key in self._values), None)
            if nearest is None:
                raise ValueError(
                    f"{caller}: {self._argument} has no entry for {show(path)}, expected a pytree "
                    f"prefix of the updates, got entries at {some(p.name for p in self._paths)}. "
                    f"Add the entry.{self._hint}"
                )
            values.append(self._values[nearest])
        return values

    def _check_entries(self, caller: str, updates: Any) -> None:
        """Refuses an entry that stands for nothing in the updates: most likely it is misspelt."""
        leaves = [path for path, _ in flatten(updates, is_childless)]
        at = {key for path in leaves for key in (path.name, path.names)}
        at_or_above = {key for path in leaves for key in _lookups(path)}
        for path in self._paths:
            # It may stand for leaves that optax.masked left out, or for a part of them.
            is_used = not at_or_above.isdisjoint((path.name, path.names))
            if not is_used and at.isdisjoint(_lookups(path)):
                raise ValueError(
                    f"{caller}: {self._argument} has an entry at {path.name!r}, where the updates "
                    f"have none. They have {some(p.name for p in leaves)}.{self._hint}"
                )


def _lookups(path: Path) -> Iterator[str | tuple[str, ...]]:
    """What to look a leaf up by: its own name, then those of the subtrees that it is in.

    In a flat prefix a name is one string, in a nested one it is several.
    """
    names = path.names
    yield from (path.name, names)
    while names:
        *outer, last = names
        above, slash, _ = last.rpartition("/")  # Haiku's "mlp/~/linear_0" is in "mlp/~".
        names = (*outer, above) if slash else tuple(outer)
        yield from (names, "/".join(names))


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths."""
    flat, _ = tree_flatten_with_path(tree, is_leaf=is_leaf)
    boxes = _boxes(tree, is_leaf) if any(keys[-1:] == _VALUE for keys, _ in flat) else set()
    shown = [keys[:-1] if keys[:-1] in boxes else keys for keys, _ in flat]
    every = [tuple(keystr((key,), simple=True) for key in keys) for keys in shown]
    counts = collections.Counter(map(join, every))
    leaves = []
    for (keys, value), names in zip(flat, every, strict=True):
        is_unique = counts[join(names)] == 1
        parts = names if is_unique else tuple(repr(n) if "/" in n else n for n in names)
        leaves.append((Path(keys, names, join(parts)), value))
    return leaves


def _boxes(tree: Any, is_leaf: Callable[[Any], bool] | None) -> set[KeyPath]:
    """Where nodes are whose only child is `.value`, as NNX's variables and Linen's boxes have."""
    # Empty subtrees are children too.
    flat, _ = tree_flatten_with_path(tree, is_leaf=lambda x: is_childless(x, is_leaf))
    nodes = {keys[:end] for keys, _ in flat for end in range(1, len(keys) + 1)}
    children = collections.Counter(keys[:-1] for keys in nodes)
    return {keys[:-1] for keys in nodes if keys[-1:] == _VALUE and children[keys[:-1]] == 1}


def gradients(caller: str, updates: Any) -> list[tuple[Path, Any]]:
    """The leaves as arrays, which they need not be outside `jax.jit`; integers are refused."""
    leaves = []
    for path, x in flatten(updates):
        x = x if isinstance(x, jax.Array) or is_float0(x) else jnp.asarray(x)
        if not is_float0(x) and not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                f"{caller}: {show(path)} has dtype {x.dtype}, expected a floating or complex "
                "dtype. Cast it, or leave it out with optax.masked."
            )
        leaves.append((path, x))
    return leaves


def is_float0(x: Any) -> bool:
    """Whether a leaf is the gradient of an integer, which holds nothing."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


def is_childless(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> bool:
    """Whether a value is a leaf, or empty as None and what optax.masked puts in a leaf's place."""
    return jax.tree.structure(value, is_leaf).num_nodes == 1


def is_tree(value: Any) -> bool:
    """Whether a value is to be read as a tree: Equinox's models are trees that can be called."""
    if not callable(value):
        return True
    # jax.tree_util.Partial is a function whose arguments are a tree.
    return not isinstance(value, functools.partial) and not is_childless(value)


def join(names: tuple[str, ...]) -> str:
    """Such as "blocks/attn/kernel"; "updates" where the tree is one leaf."""
    return "/".join(names) or "updates"


def show(path: Path) -> str:
    """Such as "updates['blocks'][0]", for an error."""
    return f"updates{keystr(path.keys)}"


def some(names: Iterable[str]) -> str:
    """The first few of many names, for an error."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{names[:MOST_NAMES]}{more}"
