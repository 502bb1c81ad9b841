"""`layers_of`: what each leaf of a model is, a kernel, an embedding or a vector, and its axes."""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_unitscale.conventions import Kernel, Kind, kind_by_name
from optax_unitscale.paths import Path, flatten, matches, some

__all__ = ["Kernel", "Layer", "Layers", "layers_in", "layers_of"]

Shape = tuple[int, ...]


class Layer(NamedTuple):
    """What one leaf is. Axes are from 0 up, in order.

    Attributes:
      kind: "kernel", "embedding" or "vector", as biases and gains are.
      inputs: a kernel's input axes, the axis of an embedding's vocabulary.
      outputs: a kernel's output axes, the axis of an embedding's features, a vector's axes.
      batch: all other axes: stacked layers, experts, projections that are separate.
      blocks: how many kernels lie side by side along the first output axis, such as the groups of
        a convolution or the gates of a recurrent cell.
    """

    kind: Literal["kernel", "embedding", "vector"]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    blocks: int = 1

    def fans(self, shape: Shape) -> tuple[int, int]:
        """How many inputs one output has, and how many outputs there are, in each block.

        The input of an embedding is one token, and that of a vector is 1.
        """
        fan_out = math.prod(shape[axis] for axis in self.outputs) // self.blocks
        if self.kind == "kernel":
            return math.prod(shape[axis] for axis in self.inputs), fan_out
        return 1, fan_out


class Layers(Mapping[str, Layer]):
    """What each leaf of a model is, by name, as `layers_of` finds it: immutable and hashable."""

    def __init__(self, layers: Mapping[str, Layer], shapes: Mapping[str, Shape]):
        self._layers = dict(layers)
        self._shapes = dict(shapes)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the leaves it was found with."""
        return dict(self._shapes)

    def __getitem__(self, name: str) -> Layer:
        """What the leaf of a name is."""
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the leaves."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many leaves there are."""
        return len(self._layers)

    def __hash__(self) -> int:
        """Of the layers, not of the shapes."""
        return hash(frozenset(self._layers.items()))

    def __repr__(self) -> str:
        """As a dict."""
        return f"Layers({self._layers})"


def layers_of(
    model_or_params: Any,
    overrides: Mapping[str, Kind] | None = None,
    *,
    stacked: str | Mapping[str, int] | None = None,
) -> Layers:
    """What each leaf of a model is."""
    found = _find("layers_of", model_or_params, overrides or {}, stacked)
    shapes = {path.name: x.shape for path, x, _ in found}
    return Layers({path.name: layer for path, _, layer in found}, shapes)


def layers_in(
    caller: str, layers: Layers | Mapping[str, Kind] | None, tree: Any
) -> list[tuple[Path, Any, Layer]]:
    """Each leaf of updates or parameters and what it is; for transformations.

    Args:
      caller: for errors.
      layers: as users give it: None to find them, overrides, or what `layers_of` found.
      tree: what is in it counts: not None, `optax.MaskedNode`, `float0`, or empty leaves, and no
        integers, which `check_dtype` is for.
    """
    if not isinstance(layers, Layers):
        return _find(caller, tree, layers or {}, None)
    leaves, missing, unfit = _arrays(tree), [], []
    for path, x in leaves:
        layer = layers.get(path.name)
        if layer is None:
            missing.append(path.name)
        elif len(layer.inputs + layer.outputs + layer.batch) != x.ndim:
            unfit.append(f"{path.name} of shape {x.shape}, which is to be {layer}")
    if missing or unfit:
        what = f"no entry for {some(missing)}" * bool(missing) + " and " * bool(missing and unfit)
        what += f"entries of another rank for {some(unfit)}" * bool(unfit)
        raise ValueError(
            f"{caller}: layers has {what}. Make it of the whole model that is trained, such as "
            "layers_of(model)."
        )
    return [(path, x, layers[path.name]) for path, x in leaves]


def _arrays(tree: Any) -> list[tuple[Path, Any]]:
    """The leaves that gradients can have."""
    leaves = []
    for path, x in flatten(tree):
        if isinstance(x, float | complex):
            x = jnp.asarray(x)
        is_array = hasattr(x, "shape") and hasattr(x, "dtype")
        if is_array and jnp.issubdtype(x.dtype, jnp.inexact):
            leaves.append((path, x))
    return [(path, x) for path, x in leaves if 0 not in x.shape]


def _find(
    caller: str, tree: Any, overrides: Mapping[str, Kind], stacked: str | Mapping[str, int] | None
) -> list[tuple[Path, Any, Layer]]:
    leaves = _arrays(tree)
    full = {path.name: x.shape for path, x in leaves}
    stacks = _stacks(caller, stacked, full)
    shapes = {name: _without(shape, stacks[name]) for name, shape in full.items()}
    said: dict[str, Kind | None] = {}
    said |= {name: _override(caller, name, full[name], overrides) for name in full}
    _check_patterns(caller, overrides, places(tree))
    found, unknown = [], []
    for path, x in leaves:
        name = path.name
        kind, batch = said[name], stacks[name]
        if kind is None:
            kind = kind_by_name(name, shapes)
        elif isinstance(kind, Kernel):  # Its axes are those of the whole leaf.
            batch = ()
        if kind is None:
            unknown.append(name)
        else:
            found.append((path, x, _layer(kind, x.ndim, batch)))
    if unknown:
        raise ValueError(_help(caller, unknown, full))
    return found


def places(tree: Any) -> list[str]:
    """The names of leaves, and of those that `optax.masked` hides."""
    return [path.name for path, _ in flatten(tree, lambda x: not jax.tree.leaves(x))]


def _layer(kind: Kind, ndim: int, batch: tuple[int, ...]) -> Layer:
    """Of a kind whose axes are counted without those of a batch."""
    kept = tuple(axis for axis in range(ndim) if axis not in batch)
    if kind == "vector":
        return Layer("vector", (), kept, batch)
    if kind == "embedding":
        return Layer("embedding", kept[:-1], kept[-1:], batch)
    inputs, outputs = (
        tuple(sorted(kept[axis] for axis in _as_ints(axes))) for axes in (kind.inputs, kind.outputs)
    )
    rest = tuple(axis for axis in range(ndim) if axis not in inputs + outputs)
    return Layer("kernel", inputs, outputs, rest, kind.blocks)


def _without(shape: Shape, axes: tuple[int, ...]) -> Shape:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _stacks(
    caller: str, stacked: str | Mapping[str, int] | None, shapes: Mapping[str, Shape]
) -> dict[str, tuple[int, ...]]:
    """The axes of stacked layers that each leaf has."""
    patterns = {stacked: 0} if isinstance(stacked, str) else stacked or {}
    _check_patterns(caller, patterns, shapes)
    axes: dict[str, set[int]] = {name: set() for name in shapes}
    for pattern, axis in patterns.items():
        inside = {name: shape for name, shape in shapes.items() if matches(pattern, name)}
        unfit = {n: s for n, s in inside.items() if not -len(s) <= axis < len(s)}
        sizes = {shape[axis] for name, shape in inside.items() if name not in unfit}
        if unfit or len(sizes) > 1:
            raise ValueError(
                f"{caller}: stacked has axis {axis} for {pattern!r}, expected one of the same size "
                f"in every leaf there, got {some(f'{n}: {s}' for n, s in inside.items())}. Give a "
                "pattern that only stacked layers fit."
            )
        for name, shape in inside.items():
            axes[name].add(axis % len(shape))
    return {name: tuple(sorted(found)) for name, found in axes.items()}


def _override(caller: str, name: str, shape: Shape, overrides: Mapping[str, Kind]) -> Kind | None:
    for pattern, kind in overrides.items():
        if matches(pattern, name):
            return _checked(caller, pattern, kind, name, shape)
    return None


def _checked(caller: str, pattern: str, kind: Any, name: str, shape: Shape) -> Kind:
    if kind in ("embedding", "vector"):
        return kind
    if not isinstance(kind, Kernel):
        raise TypeError(
            f"{caller}: the override {pattern!r} is {kind!r}, expected a Kernel, 'embedding' or "
            "'vector'."
        )
    ndim = len(shape)
    try:
        inputs, outputs, blocks = _as_ints(kind.inputs), _as_ints(kind.outputs), kind.blocks
        given = {axis % ndim for axis in inputs + outputs if -ndim <= axis < ndim}
        is_fit = inputs and outputs and len(given) == len(inputs + outputs)
        if not is_fit or blocks < 1 or shape[min(axis % ndim for axis in outputs)] % blocks:
            raise TypeError
    except TypeError:
        raise ValueError(
            f"{caller}: the override {pattern!r} is {kind}, expected axes that {name} of shape "
            f"{shape} has, each once, and blocks that divide its first output axis."
        ) from None
    every = range(ndim)
    return Kernel(tuple(every[i] for i in inputs), tuple(every[i] for i in outputs), blocks)


def _as_ints(axes: int | Iterable[int]) -> tuple[int, ...]:
    every = axes if isinstance(axes, Iterable) else (axes,)
    if any(isinstance(axis, bool) for axis in every):
        raise TypeError
    return tuple(map(operator.index, every))


def _check_patterns(caller: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    idle = [p for p in patterns if not any(matches(p, name) for name in names)]
    if idle and names:
        raise ValueError(
            f"{caller}: no leaf fits {some(idle)}. There are {some(names)}; '*' is any part of "
            "one name, '**' any number of names."
        )


def _help(caller: str, unknown: list[str], shapes: Mapping[str, Shape]) -> str:
    lines = [f"{caller}: no rule says what these leaves are:"]
    lines += [f"  {name}: {shapes[name]}" for name in unknown]
    entries = {}
    for name in unknown:
        above, _, leaf = name.rpartition("/")
        own = above.rpartition("/")[2]
        pattern = f"**/{own}/{leaf}" if own and not own.isdigit() else f"**/{leaf}"
        ndim = len(shapes[name])
        is_vector = leaf in ("bias", "b", "scale", "offset")
        axes = tuple(range(1, ndim)) if ndim > 2 else 1
        entries[pattern] = "'vector'" if is_vector else f"Kernel(inputs=0, outputs={axes})"
    shown = ", ".join(f"{pattern!r}: {kind}" for pattern, kind in entries.items())
    lines.append(
        "Say it, such as layers_of(params, {" + shown + "}), or 'embedding'; where the first axis "
        "is that of stacked layers, layers_of(params, stacked='blocks/**'). A Flax NNX or Equinox "
        "model says more than its parameters: layers_of(model)."
    )
    return "\n".join(lines)
