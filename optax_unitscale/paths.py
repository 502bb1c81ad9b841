"""What leaves are called, and trees that stand for the updates: looked up by name."""

import collections
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, KeyPath, SequenceKey, keystr, tree_flatten_with_path

__all__ = [
    "Path",
    "Prefix",
    "check_dtype",
    "flatten",
    "gradients",
    "is_float0",
    "is_one_leaf",
    "is_tree",
    "join",
    "matches",
    "places",
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

    @property
    def is_item(self) -> bool:
        """Whether the leaf is an item of a list or a tuple."""
        return isinstance(self.keys[-1], SequenceKey)


class Prefix:
    """The values of a pytree prefix of the updates, looked up by the names of leaves.

    The prefix may also be flat, with names such as "dense/kernel" for keys.
    """

    def __init__(
        self,
        tree: Any,
        is_leaf: Callable[[Any], bool] | None = None,
        read: Callable[[tuple[str, ...], Any], Any] = lambda names, value: value,
    ):
        flat = flatten(tree, is_leaf)
        self.entries = [(path.names, read(path.names, value)) for path, value in flat]
        self._exact = dict(self.entries)
        self._joined = {join(names): value for names, value in self.entries}

    def find(self, path: Path) -> tuple[bool, Any]:
        """The value that stands at a leaf or above it, and whether there is one."""
        if path.name in self._joined and path.name != join(path.names):
            return True, self._joined[path.name]
        names = path.names
        exact = {join(names[:end]): names[:end] for end in range(1, len(names) + 1)}
        for above in _ancestors(join(names)):
            if exact.get(above) in self._exact:
                return True, self._exact[exact[above]]
            if above in self._joined:
                return True, self._joined[above]
        return () in self._exact, self._exact.get(())

    def check_fit(self, caller: str, argument: str, updates: Any) -> None:
        """Raises for an entry that matches nothing in the updates: most likely it is misspelt."""
        flat = flatten(updates, lambda x: not jax.tree.leaves(x))
        if any(not path.names for path, _ in flat):  # One leaf, or none at all.
            return
        found = [path.name for path, _ in flat]
        ends = {*found, *(join(path.names) for path, _ in flat)}
        inner = {above for place in ends for above in _ancestors(place)}
        for names, _ in self.entries:
            place = join(names)
            if names and found and place not in inner and ends.isdisjoint(_ancestors(place)):
                is_list = argument == "axis" and names[-1].isdigit()
                cure = " The axes of one leaf are an int or a tuple, not a list." * is_list
                raise ValueError(
                    f"{caller}: {argument} has an entry at {place!r}, where the updates have "
                    f"none. They have {some(found)}.{cure}"
                )


def _ancestors(name: str) -> list[str]:
    """The name and those of the subtrees that it is in, nearest first."""
    ends = [match.start() for match in re.finditer("/", name)]
    return [name, *(name[:end] for end in reversed(ends))]


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths."""
    flat, _ = tree_flatten_with_path(tree, is_leaf=is_leaf)
    boxes = _boxes(tree, is_leaf) if any(keys[-1:] == _VALUE for keys, _ in flat) else set()
    every = []
    for keys, _ in flat:
        shown = keys[:-1] if keys[-1:] == _VALUE and keys[:-1] in boxes else keys
        every.append(tuple(keystr((key,), simple=True) for key in shown))
    counts = collections.Counter(map(join, every))
    paths = []
    for (keys, _), names in zip(flat, every, strict=True):
        name = join(names)
        if counts[name] > 1:
            name = join(tuple(repr(part) if "/" in part else part for part in names))
        paths.append(Path(keys, names, name))
    return [(path, value) for path, (_, value) in zip(paths, flat, strict=True)]


def _boxes(tree: Any, is_leaf: Callable[[Any], bool] | None) -> set[KeyPath]:
    """Where nodes are whose only child is `.value`, as NNX's variables and Linen's boxes have."""
    # Subtrees without leaves are children too.
    flat, _ = tree_flatten_with_path(
        tree, is_leaf=lambda x: (is_leaf and is_leaf(x)) or not jax.tree.leaves(x, is_leaf=is_leaf)
    )
    children: dict[KeyPath, set[Any]] = collections.defaultdict(set)
    for keys, _ in flat:
        for depth, key in enumerate(keys):
            children[keys[:depth]].add(key)
    return {keys for keys, below in children.items() if len(below) == 1}


def places(updates: Any) -> list[str]:
    """The names of leaves, and of the empty subtrees that optax.masked puts in their place."""
    return [path.name for path, _ in flatten(updates, lambda x: not jax.tree.leaves(x))]


def gradients(updates: Any) -> list[tuple[Path, Any]]:
    """The leaves as arrays, which they need not be outside `jax.jit`."""
    return [
        (path, x if isinstance(x, jax.Array) or is_float0(x) else jnp.asarray(x))
        for path, x in flatten(updates)
    ]


def is_tree(value: Any) -> bool:
    """Whether a value is to be read as a tree: Equinox's models are trees that can be called."""
    if not callable(value):
        return True
    if isinstance(value, functools.partial):  # jax.tree_util.Partial is a tree too.
        return False
    return jax.tree.structure(value).num_nodes > 1


def is_one_leaf(value: Any) -> bool:
    """Whether a value is a leaf by itself, not a container."""
    return jax.tree_util.all_leaves([value])


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    marks = {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*"}
    parts = re.split(r"((?:^|(?<=/))\*\*/|/\*\*$|\*\*|\*)", glob)
    return re.compile("".join(marks.get(part, re.escape(part)) for part in parts))


def matches(glob: str, name: str) -> bool:
    """Whether a leaf's name fits a pattern: `*` is within one name, `**` any number of names."""
    return _pattern(glob).fullmatch(name) is not None


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
