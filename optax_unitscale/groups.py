"""Which gradient elements share a norm: scope, axis, labels and the paths that name them."""

import collections
import dataclasses
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, KeyPath, keystr, tree_flatten_with_path

__all__ = ["Group", "Member", "Plan", "assign", "make_plan"]

NORMS = ("l2", "rms", "l1", "linf")
SCOPES = ("leaf", "global")


class Path(NamedTuple):
    """Where a leaf is, as JAX says it and as people do."""

    keys: KeyPath
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Such as "blocks/attn/kernel"."""
        return _join(self.names)


class Member(NamedTuple):
    """One leaf's part in a group: which leaf it is, and what its norm runs over.

    `leaf` counts through the flattened updates, `axes` are the axes of the leaf that are reduced,
    and `mesh_axes` those of the mesh over which it is split, None where JAX is to be asked.
    """

    leaf: int
    axes: tuple[int, ...]
    mesh_axes: tuple[Hashable, ...] | None


class Group(NamedTuple):
    """Leaves that share one norm, or one norm for each index of their kept axes."""

    name: str
    members: tuple[Member, ...]


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """A transformation's static arguments, checked and hashable: a key for `jax.jit`."""

    caller: str
    norm: str
    scope: str | Callable[..., Any] | Prefix
    axis: Callable[..., Any] | Prefix
    axis_name: tuple[Hashable, ...] | Callable[..., Any] | None


def make_plan(caller: str, norm: Any, scope: Any, axis: Any, axis_name: Any) -> Plan:
    """Checks the static arguments that `unit_scale` and `gradient_norms` have in common."""
    if norm not in NORMS:
        raise ValueError(f"{caller}: norm is {norm!r}, expected one of {', '.join(NORMS)}.")
    if isinstance(scope, str) and scope not in SCOPES:
        raise ValueError(
            f"{caller}: scope is {scope!r}, expected 'leaf', 'global', a pytree of labels, "
            "or a callable that returns one."
        )
    if isinstance(axis, jax.Array):
        raise TypeError(
            f"{caller}: axis is an array, expected static integers. Under "
            "optax.inject_hyperparams name it in static_args=('axis',)."
        )
    if not callable(scope) and not isinstance(scope, str):
        scope = _prefix(scope)
    if not callable(axis):
        entries = _prefix(axis, is_leaf=_is_axes).entries
        # NumPy's integers do not compare with tuples, and JAX compares what it caches on.
        axis = Prefix(tuple((names, _as_ints(value)) for names, value in entries))
    if axis_name is not None and not callable(axis_name):
        axis_name = _as_names(axis_name)
    plan = Plan(caller, norm, scope, axis, axis_name)
    try:
        hash(plan)
    except TypeError as error:
        raise TypeError(
            f"{caller}: scope, axis and axis_name must be hashable, for the compiled update is "
            f"cached on them, but {error}. Pass a function or a hashable label."
        ) from None
    return plan


def assign(plan: Plan, updates: Any) -> tuple[list[Any], list[Group]]:
    """Splits a tree of updates into its leaves and the groups that are normed together.

    Leaves without elements and `float0` leaves belong to no group.

    Args:
      plan: from `make_plan`.
      updates: the gradient pytree.

    Returns:
      The leaves as arrays, and the groups in the order of their first leaf.

    Raises:
      TypeError: a leaf is neither floating nor complex.
      ValueError: labels, axes or kept axes do not fit the updates.
    """
    flat = _flatten(updates)
    paths, leaves = [path for path, _ in flat], [x for _, x in flat]
    for path, x in flat:
        _check_dtype(plan, path, x)
    _check_fit(plan, "axis", plan.axis, updates)
    labels = _labels(plan, updates, paths)
    groups: dict[Any, list[Member]] = {}
    names: dict[Any, str] = {}
    kept: dict[Any, tuple[tuple[int, ...], Path]] = {}
    for index, (path, x, label) in enumerate(zip(paths, leaves, labels, strict=True)):
        if _is_float0(x) or x.size == 0:
            continue
        axes = _axes(plan, path, x)
        shape = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        first_shape, first_path = kept.setdefault(label, (shape, path))
        if shape != first_shape:
            raise ValueError(
                f"{plan.caller}: {_show(path)} of shape {x.shape} keeps axes of shape {shape}, but "
                f"{_show(first_path)} of the same group keeps {first_shape}. Leaves that share a "
                "norm must keep equal axes: change axis, or give them different labels."
            )
        names.setdefault(label, path.name if plan.scope == "leaf" else str(label))
        groups.setdefault(label, []).append(Member(index, axes, _mesh_axes(plan, path, x)))
    return leaves, [Group(names[label], tuple(members)) for label, members in groups.items()]


def _labels(plan: Plan, updates: Any, paths: list[Path]) -> list[Any]:
    if isinstance(plan.scope, str):
        return ["global"] * len(paths) if plan.scope == "global" else list(range(len(paths)))
    labels = plan.scope if isinstance(plan.scope, Prefix) else _prefix(plan.scope(updates))
    _check_fit(plan, "scope", labels, updates)
    found = [labels.find(path.names) for path in paths]
    for path, (is_found, label) in zip(paths, found, strict=True):
        if not is_found:
            raise ValueError(
                f"{plan.caller}: scope has no label for {_show(path)}, expected a pytree prefix "
                f"of the updates, got labels at {[_join(p) for p, _ in labels.entries]}."
            )
        if not isinstance(label, Hashable):
            raise TypeError(
                f"{plan.caller}: scope gives {_show(path)} the label {label!r} of type "
                f"{type(label).__name__}, expected something hashable, such as a string."
            )
    return [label for _, label in found]


def _check_fit(plan: Plan, argument: str, prefix: Any, updates: Any) -> None:
    """An entry of a prefix that stands for nothing in the updates is most likely misspelt."""
    if not isinstance(prefix, Prefix):
        return
    # Subtrees without leaves count: optax.masked puts them where others' leaves were.
    paths = [path.names for path, _ in _flatten(updates, _is_empty)]
    for start, _ in prefix.entries:
        if not any(start[: len(p)] == p[: len(start)] for p in paths) and paths:
            raise ValueError(
                f"{plan.caller}: {argument} has an entry at {_join(start)!r}, where the "
                f"updates have none. They have {[_join(p) for p in paths]}."
            )


def _axes(plan: Plan, path: Path, x: jax.Array) -> tuple[int, ...]:
    if isinstance(plan.axis, Prefix):
        is_found, axes = plan.axis.find(path.names)
        if not is_found:
            raise ValueError(
                f"{plan.caller}: axis has no entry for {_show(path)}, expected a pytree prefix of "
                "the updates. Add the entry; None stands for all axes."
            )
    else:
        axes = plan.axis(path.name, x)
    if axes is None:
        return tuple(range(x.ndim))
    if not _is_axes(axes):
        raise TypeError(
            f"{plan.caller}: axis gives {axes!r} for {_show(path)}, expected None, an int, or a "
            "tuple of ints."
        )
    given = axes if isinstance(axes, tuple) else (axes,)
    for axis in given:
        if not -x.ndim <= axis < x.ndim:
            expected = f"{-x.ndim} to {x.ndim - 1}" if x.ndim else "None or ()"
            raise ValueError(
                f"{plan.caller}: axis {axis} is out of range for {_show(path)} of shape {x.shape}, "
                f"expected {expected}. A callable axis can treat leaves differently."
            )
    resolved = tuple(sorted({operator.index(axis) % x.ndim for axis in given}))
    if len(resolved) < len(given):
        raise ValueError(
            f"{plan.caller}: axis {axes} names an axis twice for {_show(path)} of shape {x.shape}. "
            "Name each axis once."
        )
    return resolved


def _mesh_axes(plan: Plan, path: Path, x: jax.Array) -> tuple[Hashable, ...] | None:
    if not callable(plan.axis_name):
        return plan.axis_name
    names = plan.axis_name(path.name, x)
    return None if names is None else _as_names(names)


def _as_names(names: Any) -> tuple[Hashable, ...]:
    return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def _check_dtype(plan: Plan, path: Path, x: jax.Array) -> None:
    if not _is_float0(x) and not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{plan.caller}: {_show(path)} has dtype {x.dtype}, expected a floating or complex "
            "dtype. Cast it, or leave it out with optax.masked."
        )


def _is_float0(x: Any) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0


def _is_axes(value: Any) -> bool:
    """Whether a value is the axes of one leaf, rather than a container of such values."""
    if value is None:
        return True
    members = value if type(value) is tuple else (value,)
    return all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in members)


def _as_ints(axes: Any) -> Any:
    if axes is None or not _is_axes(axes):
        return axes
    return tuple(map(operator.index, axes)) if isinstance(axes, tuple) else operator.index(axes)


def _is_empty(tree: Any) -> bool:
    return not jax.tree.leaves(tree)


def _prefix(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Prefix:
    return Prefix(tuple((path.names, value) for path, value in _flatten(tree, is_leaf)))


def _flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths."""
    everything, _ = tree_flatten_with_path(
        tree, is_leaf=lambda x: (is_leaf and is_leaf(x)) or _is_empty(x)
    )
    children: dict[KeyPath, set[Any]] = collections.defaultdict(set)
    for keys, _ in everything:
        for depth, key in enumerate(keys):
            children[keys[:depth]].add(key)
    flat, _ = tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(Path(keys, _names(keys, children)), value) for keys, value in flat]


def _names(keys: KeyPath, children: Mapping[KeyPath, set[Any]]) -> tuple[str, ...]:
    # NNX variables and Linen's boxes put their one value behind a `.value` that no user wrote.
    if keys and keys[-1] == GetAttrKey("value") and len(children[keys[:-1]]) == 1:
        keys = keys[:-1]
    return tuple(keystr((key,), simple=True) for key in keys)


def _join(names: tuple[str, ...]) -> str:
    return "/".join(names) or "updates"


def _show(path: Path) -> str:
    return f"updates{keystr(path.keys)}"
