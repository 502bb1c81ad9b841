"""Which gradient elements share a norm: scope, axis and labels."""

import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import SequenceKey, all_leaves
from numpy.lib.array_utils import normalize_axis_tuple

from optax_unitscale.mesh import partitions, reduced_as, without_reduced
from optax_unitscale.norms import Reduction
from optax_unitscale.overrides import Stacked, check_patterns
from optax_unitscale.paths import Path, Prefix, flatten, gradients, is_childless, is_tree, show

__all__ = ["Group", "Plan", "assign", "check_scalar", "make_plan", "map_groups"]

NORMS = ("l2", "rms", "l1", "linf")
SCOPES = ("leaf", "layer", "global")

Rule = Callable[..., list[jax.Array]]  # Called as rule(leaves, scalar, norm, over).


class Group(NamedTuple):
    """Leaves that share one norm, or one norm for each index of the axes that they keep.

    `leaves` are indices into the flattened updates; `over` says for each what the norm runs over.
    """

    name: str
    leaves: tuple[int, ...]
    over: tuple[Reduction, ...]


class Plan(NamedTuple):
    """The arguments that say which elements share a norm, checked."""

    caller: str
    norm: str
    scope: str | Prefix | Callable[..., Any]
    axis: Prefix | Callable[..., Any]
    axis_name: Any


def make_plan(caller: str, norm: Any, scope: Any, axis: Any, axis_name: Any) -> Plan:
    """Checks the arguments that the transformations have in common."""
    if norm not in NORMS:
        raise ValueError(f"{caller}: norm is {norm!r}, expected one of {', '.join(NORMS)}.")
    if is_tree(scope):
        scope = _read_scope(caller, scope)
    if isinstance(axis, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{caller}: axis is an array, expected static integers. Under optax.inject_hyperparams "
            "name it in static_args=('axis',)."
        )
    if is_tree(axis):
        hint = " One leaf has None for all axes, an int or a tuple; a list is for several leaves."
        axis = Prefix("axis", axis, lambda x: x is None or _is_axes(x), hint)
    return Plan(caller, norm, scope, axis, axis_name)


def check_scalar(caller: str, argument: str, value: Any) -> jax.typing.ArrayLike:
    """A scalar argument in [0, ∞): a float, or an array of JAX's as it is."""
    if type(value) is int:  # NumPy would hold a large one as an object.
        value = float(value)
    dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        cure = " A schedule goes through optax.inject_hyperparams." * callable(value)
        raise TypeError(f"{caller}: {argument} is {value!r}, expected a real number.{cure}")
    if np.shape(value) != ():
        raise ValueError(f"{caller}: {argument} has shape {np.shape(value)}, expected a scalar.")
    largest = float(jnp.finfo(jnp.result_type(float)).max)
    if not isinstance(value, Tracer) and not 0 <= float(value) <= largest:
        raise ValueError(f"{caller}: {argument} is {value}, expected 0 to {largest:.2g}.")
    return value if isinstance(value, jax.Array) else float(value)


def map_groups(rule: Rule, plan: Plan, updates: Any, scalar: jax.typing.ArrayLike) -> Any:
    """The updates with `rule(leaves, scalar, norm, over)` in the place of each group's leaves."""
    leaves, groups = assign(plan, updates)
    mapped = _map(leaves, scalar, rule=rule, norm=plan.norm, groups=groups)
    return jax.tree.unflatten(jax.tree.structure(updates), mapped)


@functools.partial(jax.jit, static_argnames=("rule", "norm", "groups"), inline=True)
def _map(
    leaves: list[Any], scalar: jax.Array, *, rule: Rule, norm: str, groups: tuple[Group, ...]
) -> list[Any]:
    # Part of the caller's program; groups that are alike are traced once.
    rule = jax.jit(rule, static_argnums=(2, 3))
    mapped = list(leaves)
    for group in groups:
        plain = [without_reduced(leaves[i]) for i in group.leaves]
        results = rule(plain, scalar, norm, group.over)
        for i, x in zip(group.leaves, results, strict=True):
            mapped[i] = reduced_as(leaves[i], x)
    return mapped


def assign(plan: Plan, updates: Any) -> tuple[list[Any], tuple[Group, ...]]:
    """The leaves of the updates as arrays, and the groups of them that share a norm.

    Leaves that are empty or `float0` belong to no group. This runs outside `jax.jit`. What is
    compiled is cached on the groups, not on the arguments that led to them, so a callable made anew
    for each call compiles nothing.
    """
    flat = gradients(plan.caller, updates)
    indices = [i for i, (_, x) in enumerate(flat) if x.dtype != jax.dtypes.float0 and x.size != 0]
    leaves = [flat[i] for i in indices]
    labels = _labels(plan, updates, [path for path, _ in leaves])
    over = dict(zip(indices, _reductions(plan, updates, leaves), strict=True))
    members: dict[Hashable, tuple[str, list[int]]] = {}
    for i, (label, name) in zip(indices, labels, strict=True):
        members.setdefault(label, (name, []))[1].append(i)
    groups = []
    for name, own in members.values():
        _check_kept(plan.caller, [(*flat[i], over[i]) for i in own])
        groups.append(Group(name, tuple(own), tuple(over[i] for i in own)))
    return [x for _, x in flat], tuple(groups)


def _labels(plan: Plan, updates: Any, paths: list[Path]) -> list[tuple[Hashable, str]]:
    """For each leaf the label of its group, and the group's name."""
    scope = plan.scope
    if callable(scope):
        made = scope(updates)
        may_be_one = isinstance(made, str) or is_childless(updates)
        scope = _read_scope(plan.caller, made, may_be_one)
    if isinstance(scope, Prefix):
        labels = scope.broadcast(plan.caller, updates, paths)
        for path, label in zip(paths, labels, strict=True):
            if not isinstance(label, Hashable):
                raise TypeError(
                    f"{plan.caller}: scope gives {show(path)} the label {label!r} of type "
                    f"{type(label).__name__}, expected something hashable, such as a string."
                )
        return [(label, str(label)) for label in labels]
    if scope == "leaf":
        return [(i, path.name) for i, path in enumerate(paths)]
    if scope == "global":
        return [("global", "global") for _ in paths]
    is_item = [len(path.keys) == 1 and isinstance(path.keys[0], SequenceKey) for path in paths]
    if any(is_item) and len(paths) > 1:
        raise ValueError(
            f"{plan.caller}: scope is 'layer', the default of unit_sgd, but the updates are a list "
            "of arrays, which no name assigns to layers. Give labels, such as scope=['dense', "
            "'dense', 'head', 'head'], or use scope='leaf'."
        )
    return [(layer, "/".join(layer) or "updates") for layer in map(_layer, paths)]


def _layer(path: Path) -> tuple[str, ...]:
    """The names of the module that a leaf is in; keys may be "dense/kernel" or "dense.kernel"."""
    *outer, last = path.names or ("",)
    above = re.match(r"(.+)[/.]", last)
    return (*outer, above[1]) if above else tuple(outer)


def _read_scope(caller: str, scope: Any, may_be_one: bool = False) -> str | Prefix:
    """One of `SCOPES`, or labels; one label for a whole tree only if it `may_be_one`."""
    if isinstance(scope, str) and scope in SCOPES:
        return scope
    if (scope is None or all_leaves([scope])) and not may_be_one:
        # A misspelt scope, or what a wrapper made of the user's function by calling it.
        raise ValueError(
            f"{caller}: scope is {scope!r}, expected {', '.join(map(repr, SCOPES))}, a pytree of "
            "labels, or a callable that returns one. Under optax.inject_hyperparams name it in "
            "static_args=('scope',)."
        )
    return Prefix("scope", scope)


def _reductions(plan: Plan, updates: Any, leaves: list[tuple[Path, jax.Array]]) -> list[Reduction]:
    """What the norm of each leaf runs over."""
    if isinstance(plan.axis, Prefix):
        every = plan.axis.broadcast(plan.caller, updates, [path for path, _ in leaves])
    else:
        every = [plan.axis(path.name, x) for path, x in leaves]
    if isinstance(plan.axis, Stacked):
        # The pattern may be for leaves that optax.masked left out.
        names = [path.name for path, _ in flatten(updates, is_childless)]
        check_patterns(plan.caller, "stacked", [plan.axis.pattern], names)
    return [_reduction(plan, path, x, axes) for (path, x), axes in zip(leaves, every, strict=True)]


def _reduction(plan: Plan, path: Path, x: jax.Array, axes: Any) -> Reduction:
    mesh_axes = plan.axis_name(path.name, x) if callable(plan.axis_name) else plan.axis_name
    if mesh_axes is not None:
        mesh_axes = tuple(mesh_axes) if isinstance(mesh_axes, (tuple, list)) else (mesh_axes,)
    if axes is None:
        return Reduction(tuple(range(x.ndim)), mesh_axes)
    where = f"{plan.caller}: axis gives {axes!r} for {show(path)} of shape {x.shape}"
    if not _is_axes(axes):
        raise TypeError(f"{where}, expected None, an int, or a tuple of ints.")
    try:
        return Reduction(tuple(sorted(normalize_axis_tuple(axes, x.ndim))), mesh_axes)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}. Name axes that it has, each once. A callable axis can treat leaves "
            "differently."
        ) from None


def _is_axes(value: Any) -> bool:
    """Whether a value is the axes of one leaf, rather than a container of such values."""
    members = value if type(value) is tuple else (value,)
    return all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in members)


def _check_kept(caller: str, group: list[tuple[Path, jax.Array, Reduction]]) -> None:
    """Leaves that share a norm must keep axes of one shape, split alike if meshes are explicit."""
    shapes = [over.kept(x.shape) for _, x, over in group]
    splits = [over.kept(partitions(caller, path, x)) for path, x, over in group]
    first = group[0][0]
    for (path, x, _), shape, split in zip(group, shapes, splits, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"{caller}: {show(path)} of shape {x.shape} keeps axes of shape {shape}, but "
                f"{show(first)} of the same group keeps {shapes[0]}. Leaves that share a norm must "
                "keep equal axes: change axis, or give them different labels."
            )
        if split and splits[0] and split != splits[0]:
            raise ValueError(
                f"{caller}: {show(path)} is split over {split} along the axes that it keeps, but "
                f"{show(first)} of the same group over {splits[0]}. Leaves that share a norm must "
                "be split alike there: use jax.sharding.reshard, or give them different labels."
            )
