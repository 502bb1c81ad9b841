"""`layers_of`: what each leaf of a model is, a kernel, an embedding or a vector, and its axes."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_unitscale.conventions import kind_by_name, split
from optax_unitscale.modules import Declared, Modules, declared, is_equinox, open_model
from optax_unitscale.overrides import (
    Kernel,
    Kind,
    Shape,
    Stacked,
    as_ints,
    check_patterns,
    of_stack,
    override_of,
    stacked_axes,
)
from optax_unitscale.paths import Path, flatten, is_childless, some
from optax_unitscale.unknown import explain

__all__ = ["Kernel", "Layer", "Layers", "layers_in", "layers_of"]


class Layer(NamedTuple):
    """What one leaf is. Axes are counted from 0, in order.

    Attributes:
      kind: "kernel", "embedding", or "vector", as biases and gains are.
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
        """How many inputs an output sees, and how many outputs there are, in each block.

        An embedding sees one token at a time, and a vector has one input, the number 1.
        """
        fan_in = math.prod(shape[axis] for axis in self.inputs) if self.kind == "kernel" else 1
        return fan_in, math.prod(shape[axis] for axis in self.outputs) // self.blocks


class Layers(Mapping[str, Layer]):
    """What each leaf of a model is, by name, as `layers_of` finds it: immutable and hashable.

    Attributes:
      shapes: those of the leaves it was found with, by name.
    """

    def __init__(self, layers: Mapping[str, Layer], shapes: Mapping[str, Shape]):
        self._layers = dict(layers)
        self.shapes = dict(shapes)

    def __getitem__(self, name: str) -> Layer:
        """What the leaf of this name is."""
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the leaves."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many leaves there are."""
        return len(self._layers)

    def __hash__(self) -> int:
        """Of the layers, as equality is."""
        return hash(frozenset(self._layers.items()))

    def map(self, function: Callable[[Any], Any], tree: Any) -> Any:
        """Calls `function` with the layer of each leaf of `tree`, and returns a tree like it.

        An unknown leaf has the layer None. Use it for the masks and labels of other
        transformations, such as, where all leaves are known, one for each kind of leaf:
        ``optax.partition(rules, lambda tree: layers.map(lambda layer: layer.kind, tree))``.
        """
        values = [function(self._layers.get(path.name)) for path, _ in flatten(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), values)

    def __repr__(self) -> str:
        """As a dict."""
        return f"Layers({self._layers})"


def layers_of(
    model_or_params: Any,
    overrides: Mapping[str, Kind] | None = None,
    *,
    stacked: str | Mapping[str, int] | Stacked | None = None,
) -> Layers:
    """What each leaf of a model is: a kernel and its axes, an embedding, or a vector.

    A Flax NNX or Equinox model is read by the types of its modules. Parameters without modules, as
    Linen, Haiku and `flax.nnx.state` have them, are read by names and shapes:

    ====================================  =========================  =========
    name                                  shape                      kind
    ====================================  =========================  =========
    any                                   () or (n,)                 vector
    `kernel`, `w`                         (in, out)                  kernel
    `kernel`, `w` beside a bias (out,)    (…, in, out)               kernel
    `kernel`, `w` in `Conv_0`, `conv1`    (…, in, out)               kernel
    `query`, `key`, `value/kernel`        (in, heads, head_dim)      kernel
    `query`, `key`, `value/bias`          (heads, head_dim)          vector
    `out/kernel` beside these             (heads, head_dim, out)     kernel
    `embedding`, `embeddings`             (vocabulary, features)     embedding
    `lora_a`, `lora_b`                    (in, rank), (rank, out)    kernel
    ====================================  =========================  =========

    A leaf that can be several things raises an error, which lists all such leaves and the lines to
    write: stacked layers; convolutions of one channel, which may be depthwise; other names. A
    kernel whose name stands for query, key and value in one (`qkv`, `c_attn`, `in_proj`,
    `query_key_value`, `kv`) does too: it may be one kernel, or three, or two, of one width, which
    are its `blocks`. Names do not show all: tell it of a convolution with groups of several
    channels, and of a Haiku LSTM with a name of its own:
    ``{"encoder/linear/w": Kernel(0, 1, blocks=4)}``.

    Args:
      model_or_params: a Flax NNX module, an Equinox module, or a pytree of arrays or shapes.
      overrides: what some leaves are, by patterns of their names: a `Kernel`, "embedding" or
        "vector". ``*`` stands for a part of one name, ``**`` for any number of names; the first
        pattern that fits counts. A kernel's axes are those of the whole leaf.
      stacked: a pattern of the leaves whose first axis is that of stacked layers, as Linen's
        `nn.scan` makes it, patterns with the axis, ``{"decoder/layers/**": 1}``, or what `stacked`
        returns. The rest of the shape is read as above. NNX and Equinox modules do not need it.

    Returns:
      `Layers`: a `Layer` for each name, as `gradient_norms` has them. Integers, None and empty
      leaves have none.

    Raises:
      TypeError: `overrides` or `stacked` is none of those above; the model holds no arrays.
      ValueError: what a leaf is cannot be told; a pattern fits no leaf; axes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_unitscale import Kernel, layers_of
      >>> params = {"qkv": {"kernel": jnp.ones((32, 3, 4, 8)), "bias": jnp.ones(96)}}
      >>> layers = layers_of(params, {"**/qkv/kernel": Kernel(inputs=0, outputs=(2, 3))})
      >>> layers["qkv/kernel"]
      Layer(kind='kernel', inputs=(0,), outputs=(2, 3), batch=(1,), blocks=1)
      >>> layers["qkv/bias"].kind
      'vector'
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(
            f"layers_of: overrides is {overrides!r}, expected a dict from patterns to a Kernel, "
            "'embedding' or 'vector'. Stacked layers are named by stacked=."
        )
    found = _find("layers_of", model_or_params, overrides or {}, stacked)
    shapes = {path.name: x.shape for path, x, _ in found}
    return Layers({path.name: layer for path, _, layer in found}, shapes)


def layers_in(
    caller: str,
    layers: Layers | Mapping[str, Kind] | None,
    tree: Any,
    known: Mapping[str, Layer] | None = None,
) -> list[tuple[Path, Any, Layer]]:
    """The leaves of updates or parameters that have a gradient, and what they are.

    None, `optax.MaskedNode`, `float0`, empty leaves and integers are left out; `gradients` refuses
    the integers.

    Args:
      caller: for errors.
      layers: as users give it: None to find them, overrides, or what `layers_of` found.
      tree: parameters or updates; may be traced.
      known: what some leaves are whatever `layers` says.
    """
    known = known or {}
    if layers is not None and not isinstance(layers, Mapping):
        raise TypeError(
            f"{caller}: layers is a {type(layers).__name__}, expected what layers_of(model) "
            "returns, overrides for it, or None."
        )
    if not isinstance(layers, Layers):
        return _find(caller, tree, layers or {}, None, known)
    leaves = _trained(*open_model(tree))
    said = {path.name: known.get(path.name) or layers.get(path.name) for path, _ in leaves}
    wrong = []
    for path, x in leaves:
        layer = said[path.name]
        if layer is None:
            wrong.append(f"no entry for {path.name} {x.shape}")
        elif len(layer.inputs + layer.outputs + layer.batch) != x.ndim:
            wrong.append(f"{layer} for {path.name} {x.shape}")
    if wrong:
        raise ValueError(
            f"{caller}: layers does not fit, it has {some(wrong)}. Make it from the model that is "
            "trained, such as layers_of(model)."
        )
    return [(path, x, layer) for path, x in leaves if (layer := said[path.name])]


def _trained(tree: Any, modules_around: Modules) -> list[tuple[Path, Any]]:
    """The leaves that can have a gradient."""
    leaves = []
    for path, leaf in flatten(tree):
        # A number in an Equinox module is a setting, such as the rate of dropout.
        is_number = isinstance(leaf, float | complex) and not is_equinox(modules_around(path))
        x: Any = jnp.asarray(leaf) if is_number else leaf
        is_array = hasattr(x, "shape") and hasattr(x, "dtype")
        if is_array and jnp.issubdtype(x.dtype, jnp.inexact) and 0 not in x.shape:
            leaves.append((path, x))
    return leaves


def _find(
    caller: str,
    model: Any,
    overrides: Mapping[str, Kind],
    stacked: str | Mapping[str, int] | Stacked | None,
    known: Mapping[str, Layer] | None = None,
) -> list[tuple[Path, Any, Layer]]:
    argument = "overrides" if caller == "layers_of" else "layers"
    parameters, modules_around = open_model(model)
    leaves = _trained(parameters, modules_around)
    if not leaves and any(map(callable, jax.tree.leaves(parameters))) and not is_equinox([model]):
        raise TypeError(
            f"{caller}: {type(model).__name__} holds no arrays, expected parameters, or a Flax NNX "
            "or Equinox module. Linen and Haiku keep parameters apart: layers_of(params)."
        )
    shapes = {path.name: tuple(x.shape) for path, x in leaves}
    # optax.tree.map_params calls init with a placeholder for all leaves, which has no name.
    if overrides and (leaves or not is_childless(parameters)):
        names = [path.name for path, _ in flatten(parameters, is_childless)]
        check_patterns(caller, argument, overrides, names)
    stacks = stacked_axes(caller, stacked, shapes)
    single = {name: _without(shape, stacks[name]) for name, shape in shapes.items()}
    modules = {path.name: modules_around(path) for path, _ in leaves}
    said = {path.name: declared(modules[path.name], path.names) for path, _ in leaves}
    ways = {name: _stackings(d, single[name]) for name, d in said.items() if d}
    found: dict[str, Layer] = {}
    fused: dict[str, Kernel] = {}
    swapped: list[str] = []

    def by_name(name: str, shapes: Mapping[str, Shape]) -> Kind | None:
        is_flax = not is_equinox(modules[name])
        return None if said[name] else kind_by_name(name, shapes, is_flax)

    for name, shape in shapes.items():
        stack, batch = stacks[name], ()
        kind = override_of(caller, argument, overrides, name, shape)
        is_said = kind is not None
        if isinstance(kind, Kernel):
            stack = ()
            own = said[name]
            if own and isinstance(own.kind, Kernel) and len(own.sizes) == len(shape):
                ends = (as_ints(axes) for axes in (own.kind.outputs, own.kind.inputs))
                swapped += [name] if (kind.inputs, kind.outputs) == tuple(ends) else []
        elif kind is None and (own := said[name]):
            more = _stack_of(name, ways)
            if more is not None:
                kind, batch = own.kind, own.batch
                stack += tuple(_without(tuple(range(len(shape))), stack)[axis] for axis in more)
        elif kind is None:
            kind = by_name(name, single)
        if kind is not None:
            layer = _layer(kind, len(shape), stack, batch)
            kernel = Kernel(layer.inputs, layer.outputs, layer.blocks)
            is_open = layer.kind == "kernel" and layer.blocks == 1 and not is_said
            if is_open and split(name, shape, kernel):
                fused[name] = kernel
            else:
                found[name] = layer
    if swapped:
        raise ValueError(
            f"{caller}: {argument} has inputs for outputs in {some(swapped)}, whose modules say "
            "the opposite: swap them. Flax kernels are (in, out), Equinox weights (out, in)."
        )
    found |= known or {}
    unknown = [name for name in shapes if name not in found]
    if unknown:
        typed = {name for name, own in said.items() if own and own.kind}
        raise ValueError(explain(caller, unknown, shapes, typed, fused, by_name))
    return [(path, x, found[path.name]) for path, x in leaves]


def _layer(kind: Kind, ndim: int, stack: tuple[int, ...], batch: tuple[int, ...] = ()) -> Layer:
    """The `Layer` of a kind; `batch` counts axes without those of `stack`."""
    if isinstance(kind, Kernel):
        inputs, outputs = (of_stack(axes, ndim, stack) for axes in (kind.inputs, kind.outputs))
        every = _without(tuple(range(ndim)), inputs + outputs)
        return Layer("kernel", inputs, outputs, every, kind.blocks)
    kept = _without(tuple(range(ndim)), stack)
    every = tuple(sorted((*stack, *(kept[axis] for axis in batch))))
    kept = _without(tuple(range(ndim)), every)
    if kind == "vector":
        return Layer("vector", (), kept, every)
    return Layer("embedding", kept[:-1], kept[-1:], every)


def _without(items: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(item for axis, item in enumerate(items) if axis not in axes)


def _stackings(own: Declared, shape: Shape) -> list[tuple[int, ...]]:
    """The axes that a leaf can have beyond those of one layer, as its module has them."""
    n = len(own.sizes)
    if len(shape) == n:  # Whatever the sizes: a part of it, or a weight that was replaced.
        return [()]
    return [
        _without(tuple(range(len(shape))), axes)
        for axes in itertools.combinations(range(len(shape)), n)
        if all(size in (None, shape[axis]) for axis, size in zip(axes, own.sizes, strict=True))
    ]


def _stack_of(name: str, ways: Mapping[str, list[tuple[int, ...]]]) -> tuple[int, ...] | None:
    """The one way in which a leaf can be stacked, if need be the one for all of its module."""
    if len(ways[name]) == 1:
        return ways[name][0]
    module = name.rpartition("/")[0]
    every = [set(ways[other]) for other in ways if other.rpartition("/")[0] == module]
    common = set.intersection(*every)
    return common.pop() if len(common) == 1 else None
