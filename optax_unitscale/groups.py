"""Which gradient elements share a norm: scope, axis and labels."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.lib.array_utils import normalize_axis_tuple

from optax_unitscale.mesh import partitions, reduced_as, without_reduced
from optax_unitscale.norms import Reduction
from optax_unitscale.paths import (
    Path,
    Prefix,
    check_dtype,
    gradients,
    is_float0,
    is_one_leaf,
    is_tree,
    join,
    matches,
    places,
    show,
    some,
)

__all__ = ["Group", "Plan", "assign", "check_scalar", "make_plan", "map_groups", "stacked"]

NORMS = ("l2", "rms", "l1", "linf")
SCOPES = ("leaf", "layer", "global")


class Group(NamedTuple):
    """Leaves that share one norm, or one norm for each index of the axes that they keep.

    `leaves` count through the flattened updates; `over` says for each what the norm runs over.
    """

    name: str
    leaves: tuple[int, ...]
    over: tuple[Reduction, ...]


class Plan(NamedTuple):
    """The arguments that say which elements share a norm, checked."""

    caller: str
    norm: str
    scope: str | Callable[..., Any] | Prefix
    axis: Callable[..., Any] | Prefix
    axis_name: tuple[Hashable, ...] | Callable[..., Any] | None


def make_plan(caller: str, norm: Any, scope: Any, axis: Any, axis_name: Any) -> Plan:
    """Checks the arguments that the transformations have in common."""
    if norm not in NORMS:
        raise ValueError(f"{caller}: norm is {norm!r}, expected one of {', '.join(NORMS)}.")
    if isinstance(scope, str) or scope is None or (is_one_leaf(scope) and not callable(scope)):
        _check_scope(caller, scope)
    labels: Any = Prefix(scope) if not isinstance(scope, str) and is_tree(scope) else scope
    if isinstance(axis, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{caller}: axis is an array, expected static integers. {_name_as_static('axis')}"
        )
    if is_tree(axis):
        axis = Prefix(axis, is_leaf=_is_axes)
    if axis_name is not None and not callable(axis_name):
        axis_name = _as_names(axis_name)
    return Plan(caller, norm, labels, axis, axis_name)


def check_scalar(caller: str, argument: str, value: Any) -> jax.typing.ArrayLike:
    """A scalar argument in [0, ∞): a float, or an array of JAX's as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        # NumPy would hold a large one as an object. An int beyond float64 is out of range.
        value = float(value) if value.bit_length() < 1024 else np.inf
    dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        cure = " A schedule goes through optax.inject_hyperparams." * callable(value)
        raise TypeError(f"{caller}: {argument} is {value!r}, expected a real number.{cure}")
    if np.shape(value) != ():
        raise ValueError(f"{caller}: {argument} has shape {np.shape(value)}, expected a scalar.")
    if isinstance(value, Tracer):
        return value
    largest = float(jnp.finfo(jnp.result_type(float)).max)
    # In float64: a narrower dtype may not hold the bounds.
    if not 0 <= np.asarray(value, np.float64) <= largest:
        raise ValueError(f"{caller}: {argument} is {value}, expected 0 to {largest:.2g}.")
    return value if isinstance(value, jax.Array) else float(np.asarray(value))


def map_groups(
    rule: Callable[..., list[jax.Array]], plan: Plan, updates: Any, scalar: jax.typing.ArrayLike
) -> Any:
    """The updates with `rule(leaves, scalar, norm, over)` in the place of each group's leaves."""
    given, groups = assign(plan, updates)
    leaves = [x if is_float0(x) else without_reduced(x) for x in given]
    mapped = _map(leaves, scalar, rule=rule, norm=plan.norm, groups=groups)
    for group in groups:
        for i in group.leaves:
            mapped[i] = reduced_as(given[i], mapped[i])
    return jax.tree.unflatten(jax.tree.structure(updates), mapped)


@functools.partial(jax.jit, static_argnames=("rule", "norm", "groups"), inline=True)
def _map(
    leaves: list[Any],
    scalar: jax.typing.ArrayLike,
    *,
    rule: Callable[..., list[jax.Array]],
    norm: str,
    groups: tuple[Group, ...],
) -> list[Any]:
    # Part of the caller's program; groups that are alike are traced once.
    rule = jax.jit(rule, static_argnums=(2, 3))
    mapped = list(leaves)
    for group in groups:
        results = rule([leaves[i] for i in group.leaves], scalar, norm, group.over)
        for i, x in zip(group.leaves, results, strict=True):
            mapped[i] = x
    return mapped


def assign(plan: Plan, updates: Any) -> tuple[list[Any], tuple[Group, ...]]:
    """Splits a tree of updates into its leaves and the groups that share a norm.

    This runs outside `jax.jit`. What is compiled is cached on the groups, not on the arguments that
    led to them, so a callable made anew for each call compiles nothing.

    Args:
      plan: from `make_plan`.
      updates: the gradient pytree. Its empty and `float0` leaves belong to no group.

    Returns:
      The leaves as arrays, and the groups in the order of their first leaf.

    Raises:
      TypeError: a leaf is neither floating nor complex.
      ValueError: labels, axes or kept axes do not fit the updates.
    """
    flat = gradients(updates)
    for path, x in flat:
        check_dtype(plan.caller, path, x)
    if isinstance(plan.axis, (Prefix, _Stacked)):
        plan.axis.check_fit(plan.caller, "axis", updates)
    labels, names = _labels(plan, updates, [path for path, _ in flat])
    groups: dict[Any, list[tuple[int, Reduction]]] = {}
    firsts: dict[Any, tuple[Path, jax.Array, tuple[int, ...]]] = {}
    for index, ((path, x), label) in enumerate(zip(flat, labels, strict=True)):
        if is_float0(x) or x.size == 0:
            continue
        axes = _axes(plan, path, x)
        _check_kept(plan.caller, (path, x, axes), firsts.setdefault(label, (path, x, axes)))
        mesh_axes = plan.axis_name
        if callable(mesh_axes):
            mesh_axes = mesh_axes(path.name, x)
            mesh_axes = mesh_axes if mesh_axes is None else _as_names(mesh_axes)
        groups.setdefault(label, []).append((index, Reduction(axes, mesh_axes)))
    return [x for _, x in flat], tuple(
        Group(names[label], *map(tuple, zip(*members, strict=True)))
        for label, members in groups.items()
    )


def _labels(plan: Plan, updates: Any, paths: list[Path]) -> tuple[list[Any], dict[Any, str]]:
    """A label for each leaf, and the name of the group that each label stands for."""
    scope: Any = plan.scope
    if not isinstance(scope, (str, Prefix)):
        scope = scope(updates)
        if not isinstance(scope, str) and is_one_leaf(scope) and not is_one_leaf(updates):
            _check_scope(plan.caller, scope)
        if not isinstance(scope, str) or scope not in SCOPES:
            scope = Prefix(scope)
    if isinstance(scope, Prefix):
        return _labels_by_user(plan.caller, scope, updates, paths)
    if scope == "leaf":
        return list(range(len(paths))), {i: path.name for i, path in enumerate(paths)}
    if scope == "global":
        return ["global"] * len(paths), {"global": "global"}
    if len(paths) > 1 and any(len(path.names) == 1 and path.is_item for path in paths):
        raise ValueError(
            f"{plan.caller}: scope is 'layer', but the updates are a list of arrays, which no name "
            "assigns to layers. Give labels, such as scope=['dense', 'dense', 'head', 'head'], or "
            "use scope='leaf'."
        )
    layers = [path.names[:-1] for path in paths]
    return layers, {layer: join(layer) for layer in layers}


def _labels_by_user(
    caller: str, scope: Prefix, updates: Any, paths: list[Path]
) -> tuple[list[Any], dict[Any, str]]:
    scope.check_fit(caller, "scope", updates)
    labels = []
    for path in paths:
        is_found, label = scope.find(path)
        if not is_found:
            raise ValueError(
                f"{caller}: scope has no label for {show(path)}, expected a pytree prefix "
                f"of the updates, got labels at {some(join(names) for names, _ in scope.entries)}. "
                "Add the label."
            )
        if not isinstance(label, Hashable):
            raise TypeError(
                f"{caller}: scope gives {show(path)} the label {label!r} of type "
                f"{type(label).__name__}, expected something hashable, such as a string."
            )
        labels.append(label)
    return labels, {label: str(label) for label in labels}


def _axes(plan: Plan, path: Path, x: jax.Array) -> tuple[int, ...]:
    if isinstance(plan.axis, Prefix):
        is_found, axes = plan.axis.find(path)
        if not is_found:
            raise ValueError(
                f"{plan.caller}: axis has no entry for {show(path)}, expected a pytree prefix of "
                "the updates. Add the entry; None stands for all axes."
            )
    else:
        axes = plan.axis(path.name, x)
    if axes is None:
        return tuple(range(x.ndim))
    where = f"{plan.caller}: axis gives {axes!r} for {show(path)} of shape {x.shape}"
    if not _is_axes(axes):
        raise TypeError(f"{where}, expected None, an int, or a tuple of ints.")
    try:
        return tuple(sorted(normalize_axis_tuple(axes, x.ndim)))
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}. Name axes that it has, each once. A callable axis can treat leaves "
            "differently."
        ) from None


def _is_axes(value: Any) -> bool:
    """Whether a value is the axes of one leaf, rather than a container of such values."""
    members = value if type(value) is tuple else () if value is None else (value,)
    return all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in members)


def _check_scope(caller: str, scope: Any) -> None:
    """Refuses one value for a whole tree: most likely a wrapper called the user's function."""
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(
            f"{caller}: scope is {scope!r}, expected {', '.join(map(repr, SCOPES))}, a pytree of "
            f"labels, or a callable that returns one. {_name_as_static('scope')}"
        )


def _name_as_static(argument: str) -> str:
    return f"Under optax.inject_hyperparams name it in static_args=({argument!r},)."


def _as_names(names: Any) -> tuple[Hashable, ...]:
    return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def _check_kept(
    caller: str,
    member: tuple[Path, jax.Array, tuple[int, ...]],
    first: tuple[Path, jax.Array, tuple[int, ...]],
) -> None:
    """Leaves that share a norm must keep axes of one shape, split alike if meshes are explicit."""
    (path, x, axes), (first_path, first_x, first_axes) = member, first
    shape, first_shape = _kept(x.shape, axes), _kept(first_x.shape, first_axes)
    split, first_split = (_kept(partitions(caller, *m[:2]), m[2]) for m in (member, first))
    if shape != first_shape:
        raise ValueError(
            f"{caller}: {show(path)} of shape {x.shape} keeps axes of shape {shape}, but "
            f"{show(first_path)} of the same group keeps {first_shape}. Leaves that share a norm "
            "must keep equal axes: change axis, or give them different labels."
        )
    if split and first_split and split != first_split:
        raise ValueError(
            f"{caller}: {show(path)} is split over {split} along the axes that it keeps, but "
            f"{show(first_path)} of the same group over {first_split}. Leaves that share a norm "
            "must be split alike there: use jax.sharding.reshard, or give them different labels."
        )


def _kept(values: tuple[Any, ...], axes: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(value for i, value in enumerate(values) if i not in axes)


def stacked(pattern: str, axis: int = 0) -> Callable[[str, jax.Array], tuple[int, ...] | None]:
    """Axes for layers that are stacked: a value for `axis` of `unit_scale` and the others.

    Each layer of a stack then has its own norm, and every other leaf one norm.

    Args:
      pattern: names the stacked leaves: ``"blocks/**"`` is all below "blocks". ``*`` stands for
        anything within one name, ``**`` for any number of names.
      axis: the axis along which layers are stacked; MaxText's is 1.

    Returns:
      A callable from a leaf's path and the leaf to the axes of its norm: all but `axis` where the
      pattern matches, else None. It is an error if the pattern matches no leaf of the updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_unitscale import gradient_norms, stacked
      >>> gradients = {"blocks": {"kernel": jnp.ones((2, 3, 3))}, "head": jnp.ones((3, 3))}
      >>> norms = gradient_norms(gradients, axis=stacked("blocks/**"))
      >>> {name: norm.tolist() for name, norm in norms.items()}
      {'blocks/kernel': [3.0, 3.0], 'head': 3.0}
    """
    return _Stacked(pattern, operator.index(axis))


# No named tuple, which would be read as a tree of axes.
@dataclasses.dataclass(frozen=True)
class _Stacked:
    pattern: str
    axis: int

    def __call__(self, path: Any, x: Any = None) -> tuple[int, ...] | None:
        if not isinstance(path, str):
            raise TypeError(
                f"stacked: called with {path!r}, expected a leaf's path and the leaf. "
                f"{_name_as_static('axis')}"
            )
        if not matches(self.pattern, path):
            return None
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(
                f"stacked: {path!r} of shape {x.shape} has no axis {self.axis}. Change the pattern "
                f"{self.pattern!r}, or the axis."
            )
        return tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)

    def check_fit(self, caller: str, argument: str, updates: Any) -> None:
        found = places(updates)
        if found and not any(matches(self.pattern, name) for name in found):
            raise ValueError(
                f"{caller}: {argument} is stacked({self.pattern!r}), which matches no leaf of the "
                f"updates. They have {some(found)}."
            )
