"""What users say of leaves, by patterns of their names: overrides and stacked layers."""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from optax_unitscale.paths import some

__all__ = [
    "Kernel",
    "Kind",
    "Shape",
    "Stacked",
    "as_ints",
    "check_patterns",
    "matches",
    "of_stack",
    "override_of",
    "stacked",
    "stacked_axes",
]

Shape = tuple[int, ...]


class Kernel(NamedTuple):
    """A leaf that is a matrix, or a batch of them, for `layers_of`.

    Attributes:
      inputs: the axes of what goes in, an integer or a tuple; negative ones count from the end.
      outputs: the axes of what comes out. All other axes are a batch of kernels: stacked layers,
        experts, projections that are separate.
      blocks: how many kernels lie side by side along the first output axis, such as the groups of
        a convolution, the gates of a recurrent cell, or query, key and value.
    """

    inputs: int | tuple[int, ...]
    outputs: int | tuple[int, ...]
    blocks: int = 1


Kind = Kernel | Literal["embedding", "vector"]


def override_of(
    caller: str, argument: str, overrides: Mapping[str, Kind], name: str, shape: Shape
) -> Kind | None:
    """What users say that a leaf is; the first pattern that matches counts."""
    pattern = next((pattern for pattern in overrides if matches(pattern, name)), None)
    if pattern is None:
        return None
    kind: Any = overrides[pattern]
    if isinstance(kind, str) and kind in ("embedding", "vector"):
        return kind
    if not isinstance(kind, Kernel):
        raise TypeError(
            f"{caller}: {argument} has {kind!r} for {pattern!r}, expected a Kernel, 'embedding' or "
            "'vector'."
        )
    every = range(len(shape))
    try:
        inputs, outputs = (
            tuple(every[axis] for axis in as_ints(axes)) for axes in (kind.inputs, kind.outputs)
        )
        (blocks,) = as_ints(kind.blocks)
        is_once = 0 < len({*inputs, *outputs}) == len(inputs + outputs)
        if not is_once or blocks < 1 or (blocks > 1 and shape[min(outputs)] % blocks):
            raise ValueError
    except (TypeError, ValueError, IndexError):
        raise ValueError(
            f"{caller}: {argument} has {kind} for {pattern!r}, expected axes that {name} of shape "
            f"{shape} has, each once, and blocks that divide the first output axis."
        ) from None
    return Kernel(inputs, outputs, blocks)


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
    return Stacked(pattern, operator.index(axis))


# No named tuple, which would be read as a tree of axes.
@dataclasses.dataclass(frozen=True)
class Stacked:
    """What `stacked` returns."""

    pattern: str
    axis: int

    def __call__(self, path: Any, x: Any = None) -> tuple[int, ...] | None:
        """The axes of a leaf's norm."""
        if not isinstance(path, str):
            raise TypeError(
                f"stacked: called with {path!r}, expected a leaf's path and the leaf. Under "
                "optax.inject_hyperparams name it in static_args=('axis',)."
            )
        if not matches(self.pattern, path):
            return None
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(
                f"stacked: {path!r} of shape {x.shape} has no axis {self.axis}. Change the pattern "
                f"{self.pattern!r}, or the axis."
            )
        return tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)


def of_stack(axes: int | Iterable[int], ndim: int, stack: Iterable[int]) -> tuple[int, ...]:
    """The axes of one layer, counted in the leaf that stacks several."""
    kept = [axis for axis in range(ndim) if axis not in stack]
    return tuple(sorted(kept[axis] for axis in as_ints(axes)))


def stacked_axes(
    caller: str, stacked: str | Mapping[str, int] | Stacked | None, shapes: Mapping[str, Shape]
) -> dict[str, tuple[int, ...]]:
    """Along which axes each leaf holds several layers, as users say."""
    if isinstance(stacked, Stacked):  # What `unit_scale` takes as its axis.
        stacked = {stacked.pattern: stacked.axis}
    patterns = {stacked: 0} if isinstance(stacked, str) else {} if stacked is None else stacked
    if not isinstance(patterns, Mapping) or {*map(type, patterns.values())} - {int}:
        raise TypeError(
            f"{caller}: stacked is {stacked!r}, expected a pattern, or a dict from patterns to "
            'axes, such as {"encoder/**": 0, "decoder/**": 0}.'
        )
    check_patterns(caller, "stacked", patterns, shapes)
    axes: dict[str, set[int]] = {name: set() for name in shapes}
    for pattern, axis in patterns.items():
        inside = {name: shape for name, shape in shapes.items() if matches(pattern, name)}
        has_axis = [-len(shape) <= axis < len(shape) for shape in inside.values()]
        if not all(has_axis) or len({shape[axis] for shape in inside.values()}) > 1:
            raise ValueError(
                f"{caller}: stacked has axis {axis} for {pattern!r}, expected an axis of one size "
                f"in {some(f'{name} {shape}' for name, shape in inside.items())}. Give a pattern "
                "that only stacked layers match."
            )
        for name, shape in inside.items():
            axes[name].add(axis % len(shape))
    return {name: tuple(sorted(found)) for name, found in axes.items()}


def check_patterns(
    caller: str, argument: str, patterns: Iterable[str], names: Iterable[str]
) -> None:
    """Refuses a pattern that matches no leaf, which is most likely misspelt."""
    names = list(names)
    idle = [p for p in patterns if not any(matches(p, name) for name in names)]
    if idle and names:
        raise ValueError(
            f"{caller}: {argument} has {some(idle)}, which match no leaf. The leaves are "
            f"{some(names)}; '*' stands for a part of one name, '**' for any number of names."
        )


def matches(glob: str, name: str) -> bool:
    """Whether a leaf's name fits a pattern: `*` is within one name, `**` any number of names."""
    return _pattern(glob).fullmatch(name) is not None


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    marks = {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*"}
    parts = re.split(r"((?:^|(?<=/))\*\*/|/\*\*$|\*\*|\*)", glob)
    return re.compile("".join(marks.get(part, re.escape(part)) for part in parts))


def as_ints(axes: int | Iterable[int]) -> tuple[int, ...]:
    """Axes as a tuple; a TypeError for what are none, such as True."""
    every = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    if any(isinstance(axis, bool) for axis in every):
        raise TypeError
    return tuple(map(operator.index, every))
