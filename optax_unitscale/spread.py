"""Matrices across a mesh: each comes to one device, or to some, and goes back where it was."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

__all__ = ["Stack", "spread"]

Stack = jax.Array
"""Of shape (matrices, rows, columns)."""
Place = TypeVar("Place")


def spread(
    function: Callable[[Stack, tuple[str, ...]], Stack],
    view: Callable[[Place, jax.Array], Stack],
    places: Sequence[Place],
    names: Sequence[str],
    leaves: Sequence[jax.Array],
    work: float,
) -> list[jax.Array]:
    """The leaves with `function` in the place of each matrix, which no two devices work on.

    Where there are too few matrices for all devices, large ones are split by their columns.

    The mesh is that of explicit shardings, or the one that `jax.set_mesh` has set. Without any, it
    is left to XLA who works on what.

    Args:
      function: of a stack of matrices, each by itself, and the mesh axes that split their columns.
      view: the matrices of a leaf: its elements, in another order.
      places: for each leaf where its matrices lie, for `view`.
      names: for each leaf; where JAX does not show how leaves are split, those of one name, place
        and shape are taken for split alike. If they are not, more is sent.
      leaves: of one dtype, whose matrices are of one shape.
      work: the time that a matrix takes, where that of what split columns have to send is 1.
    """
    leaves, shardings = list(leaves), [jax.typeof(x).sharding for x in leaves]
    if any(AxisType.Explicit in sharding.mesh.axis_types for sharding in shardings):
        own = functools.partial(_spread, function, view, places, shardings, work)
        mesh = shardings[0].mesh
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        # Those of a surrounding jax.shard_map stay manual.
        axes = tuple(name for name, kind in kinds if kind is AxisType.Explicit)
        results: Any = jax.sharding.auto_axes(own, axes=axes, out_sharding=shardings)(leaves)
        return results
    return _spread(function, view, places, names, work, leaves)


class Layout(NamedTuple):
    """The mesh axes that split a stack, and those that split the columns of its matrices."""

    matrices: tuple[str, ...]
    columns: tuple[str, ...] = ()


def _spread(
    function: Callable[[Stack, tuple[str, ...]], Stack],
    view: Callable[[Place, jax.Array], Stack],
    places: Sequence[Place],
    likes: Sequence[Hashable],
    work: float,
    leaves: list[jax.Array],
) -> list[jax.Array]:
    views = [functools.partial(view, place) for place in places]
    shapes = [jax.eval_shape(view, x).shape for view, x in zip(views, leaves, strict=True)]
    alike = collections.defaultdict(list)
    for i, kind in enumerate(zip(places, likes, shapes, [x.shape for x in leaves], strict=True)):
        alike[kind].append(i)
    kinds = [(place, shape[0], members) for (place, _, shape, _), members in alike.items()]
    counts = [(count, len(members)) for _, count, members in kinds]
    layouts = _layouts(counts, shapes[0][1:], work)

    def gather(leaves: list[jax.Array]) -> list[list[Stack]]:
        """For each layout the stacks that it divides, first those of like leaves."""
        found, left, rest = [], kinds, []
        for layout in layouts:
            size, moves, stacks = _size(layout.matrices), _moves(layout), []
            is_last, is_pooled = layout is layouts[-1], _is_pooled(layout)
            for place, count, members in left:
                if whole := _whole(count, len(members), size):
                    # The batch axis of a leaf may be split like this already.
                    is_split = len(layout.matrices) == 1 and count % size == 0
                    stack = _stack(view, place, [leaves[i] for i in members[:whole]])
                    stacks.append(_moved(stack, moves[is_split:]))
            left = [(p, n, own) for p, n, x in left if (own := x[_whole(n, len(x), size) :])]
            if is_last or is_pooled:
                rest += [_stack(view, place, [leaves[i] for i in own]) for place, _, own in left]
                left = []
            if rest and is_pooled:
                rest = [jnp.concatenate([_moved(stack, moves[:1]) for stack in rest])]
            for last in rest:
                if more := -len(last) % size if is_last else 0:
                    # Behind a barrier: XLA:CPU else fails to compile some of these.
                    last = lax.optimization_barrier(jnp.pad(last, ((0, more), (0, 0), (0, 0))))
                if whole := len(last) // size * size:
                    stacks.append(_moved(last[:whole], moves))
            rest = [x for last in rest if len(x := last[len(last) // size * size :])]
            found.append(stacks)
        return found

    def run(layout: Layout, stacks: list[Stack]) -> list[Stack]:
        ends = list(itertools.accumulate(map(len, stacks)))
        return jnp.split(function(jnp.concatenate(stacks), layout.columns), ends[:-1])

    stacks = gather(leaves)
    for i, layout in enumerate(layouts):
        own = functools.partial(run, layout)
        if _free():
            spec = PartitionSpec(layout.matrices, None, layout.columns)
            own = jax.shard_map(own, in_specs=spec, out_specs=spec, axis_names=_free())
        stacks[i] = own(stacks[i])
    # The way back: `gather` is linear and only moves elements.
    (results,) = jax.linear_transpose(gather, leaves)(stacks)
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


def _layouts(kinds: Sequence[tuple[int, int]], shape: tuple[int, ...], work: float) -> list[Layout]:
    """As many matrices as all devices can have the same number of, and what is best for the rest.

    That is what takes the least time, with the matrices over as few devices as possible. `kinds`:
    the number of matrices of a leaf, and of such leaves.
    """
    axes = _axes()
    # From the last, the minor one where one axis of a leaf is split over several.
    whole = Layout(axes[::-1])
    rest = [count * (number - _whole(count, number, _size(axes))) for count, number in kinds]
    if _is_pooled(whole):
        rest = [sum(rest) % _size(axes)]
    options = [
        Layout(matrices, columns)
        for number in range(len(axes) + 1)
        for matrices in itertools.combinations(axes, number)
        for columns in ((), tuple(axis for axis in axes if axis not in matrices))
        if all(size % _size(columns) == 0 for size in shape)
    ]

    def cost(layout: Layout) -> tuple[float, int]:
        size = _size(layout.matrices)
        each = work / _size(layout.columns) + 1 if layout.columns else work
        stacks = [sum(rest)] if _is_pooled(layout) else rest
        return sum(math.ceil(count / size) for count in stacks) * each, size

    found = [whole] if sum(rest) < sum(count * number for count, number in kinds) else []
    return [*found, min(options, key=cost)] if sum(rest) else found


def _whole(count: int, number: int, size: int) -> int:
    """As many of `number` leaves, of `count` matrices each, as have a multiple of `size`."""
    many = size // math.gcd(size, count)
    return number // many * many


def _is_pooled(layout: Layout) -> bool:
    """Whether what is left over of all leaves is one stack, where XLA does not gather it all."""
    return len(_axes()) < 2 or layout.columns != ()


def _moves(layout: Layout) -> list[PartitionSpec]:
    """How a stack is split, one mesh axis at a time, for XLA gathers all of one that moves two."""
    matrices, free = layout.matrices, PartitionSpec.UNCONSTRAINED
    if not layout.columns:
        return [PartitionSpec(matrices[:done], free, free) for done in range(len(matrices))]
    # The columns over the last mesh axis, the rows over the others, as those of kernels often are.
    parts = _axes()[:-1], _axes()[-1:]
    return [
        PartitionSpec(matrices[:i], *(tuple(x for x in y if x not in matrices[:i]) for y in parts))
        for i in range(len(matrices) + 1)
    ]


def _moved(stack: Stack, moves: list[PartitionSpec]) -> Stack:
    return functools.reduce(lax.with_sharding_constraint, moves, stack)


def _size(axes: tuple[str, ...]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in axes)


def _axes() -> tuple[str, ...]:
    """The free mesh axes that split anything."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh.axis_names if name in _free() and mesh.shape[name] > 1)


def _free() -> set[str]:
    """The mesh axes that are not those of a surrounding `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual}
