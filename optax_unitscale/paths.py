"""What leaves are called, and trees that stand for the updates: pytree prefixes, by path."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, KeyPath, keystr, tree_flatten_with_path

__all__ = [
    "Path",
    "Prefix",
    "check_dtype",
    "check_fit",
    "flatten",
    "gradients",
    "is_float0",
    "is_tree",
    "join",
    "make_prefix",
    "matches",
    "show",
    "some",
]


MOST_NAMES = 20


class Path(NamedTuple):
    """Where a leaf is, as JAX says it and as people do."""

    keys: KeyPath
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Such as "blocks/attn/kernel"."""
        return join(self.names)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A pytree prefix made hashable: pairs of a leaf's path and its value."""

    entries: tuple[tuple[tuple[str, ...], Any], ...]

    def find(self, path: tuple[str, ...]) -> tuple[bool, Any]:
        """The value that stands at `path` or above it, and whether there is one."""
        for start, value in self.entries:
            if path[: len(start)] == start:
                return True, value
        return False, None


def _is_empty(tree: Any) -> bool:
    return not jax.tree.leaves(tree)


def make_prefix(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Prefix:
    """The values of a tree that stands for the updates, each at the path where it stands."""
    return Prefix(tuple((path.names, value) for path, value in flatten(tree, is_leaf)))


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths."""
    # Subtrees without leaves are children too; None inside one may be a leaf.
    everything, _ = tree_flatten_with_path(
        tree,
        is_leaf=lambda x: (is_leaf and is_leaf(x)) or not jax.tree.leaves(x, is_leaf=is_leaf),
    )
    children: dict[KeyPath, set[Any]] = collections.defaultdict(set)
    for keys, _ in everything:
        for depth, key in enumerate(keys):
            children[keys[:depth]].add(key)
    flat, _ = tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(Path(keys, _names(keys, children)), value) for keys, value in flat]


def gradients(updates: Any) -> list[tuple[Path, Any]]:
    """The leaves as arrays, as `jax.jit` makes them; under `jax.disable_jit` it does not."""
    return [
        (path, x if isinstance(x, jax.Array) or is_float0(x) else jnp.asarray(x))
        for path, x in flatten(updates)
    ]


def _names(keys: KeyPath, children: Mapping[KeyPath, set[Any]]) -> tuple[str, ...]:
    # NNX variables and Linen's boxes put their one value behind a `.value` that no user wrote.
    if keys and keys[-1] == GetAttrKey("value") and len(children[keys[:-1]]) == 1:
        keys = keys[:-1]
    return tuple(keystr((key,), simple=True) for key in keys)


def join(names: tuple[str, ...]) -> str:
    """Such as "blocks/attn/kernel"; "updates" where the tree is one leaf."""
    return "/".join(names) or "updates"


def some(names: Iterable[str]) -> str:
    """The first few of many names, for an error."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{names[:MOST_NAMES]}{more}"


def show(path: Path) -> str:
    """Such as "updates['blocks'][0]", for an error."""
    return f"updates{keystr(path.keys)}"


def check_fit(caller: str, argument: str, prefix: Any, updates: Any) -> None:
    """An entry of a prefix that stands for nothing in the updates is most likely misspelt."""
    if not isinstance(prefix, Prefix):
        return
    # Subtrees without leaves count: optax.masked puts them where others' leaves were.
    paths = [path.names for path, _ in flatten(updates, _is_empty)]
    for start, _ in prefix.entries:
        if not any(start[: len(p)] == p[: len(start)] for p in paths) and paths:
            is_list = argument == "axis" and start[-1].isdigit()
            cure = " The axes of one leaf are an int or a tuple, not a list." if is_list else ""
            raise ValueError(
                f"{caller}: {argument} has an entry at {join(start)!r}, where the "
                f"updates have none. They have {some(map(join, paths))}.{cure}"
            )


def check_dtype(caller: str, path: Path, x: jax.Array) -> None:
    """Refuses what is no gradient, such as an integer leaf."""
    if not is_float0(x) and not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{caller}: {show(path)} has dtype {x.dtype}, expected a floating or complex "
            "dtype. Cast it, or leave it out with optax.masked."
        )


def is_float0(x: Any) -> bool:
    """Whether a leaf is the gradient of an integer, which holds nothing."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


def is_tree(x: Any) -> bool:
    """Whether an argument is a tree, as an Equinox module with `__call__` is, and no function."""
    return not callable(x) or not jax.tree_util.all_leaves([x])


def matches(pattern: str, name: str) -> bool:
    """Whether a glob fits a name: `*` is any part of one name, `**` any number of names."""
    return _fits(pattern.split("/"), name.split("/"))


def _fits(patterns: list[str], names: list[str]) -> bool:
    if not patterns:
        return not names
    first, *others = patterns
    if first == "**":
        return any(_fits(others, names[i:]) for i in range(len(names) + 1))
    glob = ".*".join(map(re.escape, first.split("*")))
    return bool(names) and bool(re.fullmatch(glob, names[0])) and _fits(others, names[1:])
