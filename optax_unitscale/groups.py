"""Which gradient elements share a norm: scope, axis and labels."""

import dataclasses
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from optax_unitscale.paths import (
    Path,
    Prefix,
    check_dtype,
    check_fit,
    gradients,
    is_float0,
    join,
    make_prefix,
    show,
    some,
)

__all__ = ["Group", "Member", "Plan", "assign", "make_plan"]

NORMS = ("l2", "rms", "l1", "linf")
SCOPES = ("leaf", "global")


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
    if scope is None or (isinstance(scope, str) and scope not in SCOPES):
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
        scope = make_prefix(scope)
    if not callable(axis):
        entries = make_prefix(axis, is_leaf=_is_axes).entries
        for names, value in entries:
            # Now: True equals 1, and for a plan that is equal JAX has the compiled update.
            _check_axes(caller, join(names), value)
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
    flat = gradients(updates)
    paths, leaves = [path for path, _ in flat], [x for _, x in flat]
    for path, x in flat:
        check_dtype(plan.caller, path, x)
    check_fit(plan.caller, "axis", plan.axis, updates)
    labels = _labels(plan, updates, paths)
    groups: dict[Any, list[Member]] = {}
    names: dict[Any, str] = {}
    kept: dict[Any, tuple[tuple[int, ...], Path]] = {}
    splits: dict[Any, tuple[tuple[Any, ...], Path]] = {}
    for index, (path, x, label) in enumerate(zip(paths, leaves, labels, strict=True)):
        if is_float0(x) or x.size == 0:
            continue
        axes = _axes(plan, path, x)
        shape = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        first_shape, first_path = kept.setdefault(label, (shape, path))
        if shape != first_shape:
            raise ValueError(
                f"{plan.caller}: {show(path)} of shape {x.shape} keeps axes of shape {shape}, but "
                f"{show(first_path)} of the same group keeps {first_shape}. Leaves that share a "
                "norm must keep equal axes: change axis, or give them different labels."
            )
        sharding = jax.typeof(x).sharding
        if not sharding.mesh.empty:
            split = tuple(name for i, name in enumerate(sharding.spec) if i not in axes)
            _check_split(plan, path, split, *splits.setdefault(label, (split, path)))
        names.setdefault(label, path.name if plan.scope == "leaf" else str(label))
        groups.setdefault(label, []).append(Member(index, axes, _mesh_axes(plan, path, x)))
    return leaves, [Group(names[label], tuple(members)) for label, members in groups.items()]


def _check_split(
    plan: Plan, path: Path, split: tuple[Any, ...], first: tuple[Any, ...], first_path: Path
) -> None:
    """Explicit mesh axes over which kept axes are split; where they are not explicit, all None."""
    if split != first:
        raise ValueError(
            f"{plan.caller}: {show(path)} is split over {split} along the axes that it keeps, but "
            f"{show(first_path)} of the same group over {first}. Leaves that share a norm must be "
            "split alike there: use jax.sharding.reshard, or give them different labels."
        )


def _labels(plan: Plan, updates: Any, paths: list[Path]) -> list[Any]:
    if isinstance(plan.scope, str):
        return ["global"] * len(paths) if plan.scope == "global" else list(range(len(paths)))
    labels = plan.scope if isinstance(plan.scope, Prefix) else make_prefix(plan.scope(updates))
    check_fit(plan.caller, "scope", labels, updates)
    found = [labels.find(path.names) for path in paths]
    for path, (is_found, label) in zip(paths, found, strict=True):
        if not is_found:
            raise ValueError(
                f"{plan.caller}: scope has no label for {show(path)}, expected a pytree prefix "
                f"of the updates, got labels at {some(join(p) for p, _ in labels.entries)}. Add "
                "the label."
            )
        if not isinstance(label, Hashable):
            raise TypeError(
                f"{plan.caller}: scope gives {show(path)} the label {label!r} of type "
                f"{type(label).__name__}, expected something hashable, such as a string."
            )
    return [label for _, label in found]


def _axes(plan: Plan, path: Path, x: jax.Array) -> tuple[int, ...]:
    if isinstance(plan.axis, Prefix):
        is_found, axes = plan.axis.find(path.names)
        if not is_found:
            raise ValueError(
                f"{plan.caller}: axis has no entry for {show(path)}, expected a pytree prefix of "
                "the updates. Add the entry; None stands for all axes."
            )
    else:
        axes = plan.axis(path.name, x)
        _check_axes(plan.caller, show(path), axes)
    if axes is None:
        return tuple(range(x.ndim))
    given = axes if isinstance(axes, tuple) else (axes,)
    for axis in given:
        if not -x.ndim <= axis < x.ndim:
            expected = f"{-x.ndim} to {x.ndim - 1}" if x.ndim else "None or ()"
            raise ValueError(
                f"{plan.caller}: axis {axis} is out of range for {show(path)} of shape {x.shape}, "
                f"expected {expected}. A callable axis can treat leaves differently."
            )
    resolved = tuple(sorted({operator.index(axis) % x.ndim for axis in given}))
    if len(resolved) < len(given):
        raise ValueError(
            f"{plan.caller}: axis {axes} names an axis twice for {show(path)} of shape {x.shape}. "
            "Name each axis once."
        )
    return resolved


def _mesh_axes(plan: Plan, path: Path, x: jax.Array) -> tuple[Hashable, ...] | None:
    names = plan.axis_name
    if callable(names):
        names = names(path.name, x)
        names = names if names is None else _as_names(names)
    for name in names or ():
        try:
            lax.axis_size(name)
        except NameError:
            raise NameError(
                f"{plan.caller}: axis_name {name!r} for {show(path)} is no mesh axis here, "
                "expected one of jax.shard_map or jax.pmap around this call. Under jax.jit alone "
                "leave axis_name out."
            ) from None
    return names


def _as_names(names: Any) -> tuple[Hashable, ...]:
    return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def _check_axes(caller: str, where: str, axes: Any) -> None:
    if not _is_axes(axes):
        raise TypeError(
            f"{caller}: axis gives {axes!r} for {where}, expected None, an int, or a tuple of ints."
        )


def _is_axes(value: Any) -> bool:
    """Whether a value is the axes of one leaf, rather than a container of such values."""
    if value is None:
        return True
    members = value if type(value) is tuple else (value,)
    return all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in members)


def _as_ints(axes: Any) -> Any:
    if axes is None:
        return axes
    return tuple(map(operator.index, axes)) if isinstance(axes, tuple) else operator.index(axes)
