"""Matrices across a mesh: each comes whole to one device, and its parts go back where they were."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

__all__ = ["Stack", "spread"]

Stack = jax.Array
"""Of shape (matrices, rows, columns)."""
Place = TypeVar("Place")


def spread(
    function: Callable[[Stack], Stack],
    view: Callable[[Place, jax.Array], Stack],
    places: Sequence[Place],
    names: Sequence[str],
    leaves: Sequence[jax.Array],
) -> list[jax.Array]:
    """The leaves with `function` in the place of each matrix, which no two devices work on.

    The mesh is that of explicit shardings, or the one that `jax.set_mesh` has set. Without any, it
    is left to XLA who works on what.

    Args:
      function: of a stack of matrices, each by itself.
      view: the matrices of a leaf: its elements, in another order.
      places: for each leaf where its matrices lie, for `view`.
      names: for each leaf; where JAX does not show how leaves are split, those of one name, place
        and shape are taken for split alike. If they are not, more is sent.
      leaves: of one dtype, whose matrices are of one shape.
    """
    leaves, shardings = list(leaves), [jax.typeof(x).sharding for x in leaves]
    if any(AxisType.Explicit in sharding.mesh.axis_types for sharding in shardings):
        work = functools.partial(_spread, function, view, places, shardings)
        results: Any = jax.sharding.auto_axes(work, out_sharding=shardings)(leaves)
        return results
    return _spread(function, view, places, names, leaves)


def _spread(
    function: Callable[[Stack], Stack],
    view: Callable[[Place, jax.Array], Stack],
    places: Sequence[Place],
    likes: Sequence[Hashable],
    leaves: list[jax.Array],
) -> list[jax.Array]:
    views = [functools.partial(view, place) for place in places]
    shapes = [jax.eval_shape(view, x).shape for view, x in zip(views, leaves, strict=True)]
    axes, size = _axes(sum(shape[0] for shape in shapes))

    def gather(leaves: list[jax.Array]) -> list[Stack]:
        """The matrices in stacks that `size` divides, those of like leaves together."""
        alike = collections.defaultdict(list)
        for place, like, x, (count, *_) in zip(places, likes, leaves, shapes, strict=True):
            alike[place, like, x.shape, count].append(x)
        stacks, rest = [], collections.defaultdict(list)
        for kind, members in alike.items():
            place, _, _, count = kind
            many = size // math.gcd(size, count)
            whole = len(members) // many * many if axes else 0
            if whole:
                stack = _stack(view, place, members[:whole])
                stacks.append(_shared(stack, axes, count % size == 0))
            if whole < len(members):
                # XLA would gather those split otherwise over several mesh axes.
                together = kind if len(axes) > 1 else None
                rest[together].append(_stack(view, place, members[whole:]))
        for few in rest.values():
            last = jnp.concatenate(few)
            if more := -len(last) % size:
                # Behind a barrier: XLA:CPU else fails to compile some of these.
                last = lax.optimization_barrier(jnp.pad(last, ((0, more), (0, 0), (0, 0))))
            stacks.append(_shared(last, axes, False))
        return stacks

    def run(stacks: list[Stack]) -> list[Stack]:
        ends = list(itertools.accumulate(map(len, stacks)))
        return jnp.split(function(jnp.concatenate(stacks)), ends[:-1])

    if _free():
        spec = PartitionSpec(axes)
        run = jax.shard_map(run, in_specs=spec, out_specs=spec, axis_names=_free())
    # The way back: `gather` is linear and only moves elements.
    (results,) = jax.linear_transpose(gather, leaves)(run(gather(leaves)))
    if _free():
        # So XLA splits the result as the leaf. Where the leaf is NaN, the result is.
        results = [jnp.where(jnp.isnan(x), x, y) for x, y in zip(leaves, results, strict=True)]
    return results


def _stack(
    view: Callable[[Place, jax.Array], Stack], place: Place, leaves: list[jax.Array]
) -> Stack:
    # The leaves' own batch axes come first, for they may be split already.
    matrices = jax.vmap(functools.partial(view, place), out_axes=1)(jnp.stack(leaves))
    return matrices.reshape(-1, *matrices.shape[2:])


def _shared(stack: Stack, axes: tuple[str, ...], is_whole: bool) -> Stack:
    """A stack split over mesh axes, one by one, for XLA gathers everything if it is to move two."""
    free = PartitionSpec.UNCONSTRAINED
    for done in range(1 if is_whole and len(axes) == 1 else 0, len(axes)):
        stack = lax.with_sharding_constraint(stack, PartitionSpec(axes[:done], free, free))
    return stack


def _axes(count: int) -> tuple[tuple[str, ...], int]:
    """As many mesh axes as it takes to leave no device more than one matrix, and their size."""
    mesh = jax.sharding.get_abstract_mesh()
    axes, size = (), 1
    # From the last, the minor one where one axis of a leaf is split over several.
    for name in reversed(mesh.axis_names):
        if name in _free() and size < count and mesh.shape[name] > 1:
            axes, size = (*axes, name), size * mesh.shape[name]
    return axes, size


def _free() -> set[str]:
    """The mesh axes that are not those of a surrounding `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual}
