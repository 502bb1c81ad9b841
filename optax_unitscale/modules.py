"""What the modules of Flax NNX and Equinox say about their leaves.

Types are known by their names along the method resolution order: neither library is imported.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from optax_unitscale.overrides import Kernel, Kind
from optax_unitscale.paths import Path

__all__ = ["Declared", "Modules", "declared", "is_equinox", "open_model"]


class Declared(NamedTuple):
    """What a module says of a leaf: axes and sizes are those of one layer, not of a stack.

    Attributes:
      kind: its axes count within `sizes`; None where it cannot be told.
      sizes: the shape; None where the module does not say it.
      batch: a vector's batch axes.
    """

    kind: Kind | None
    sizes: tuple[int | None, ...]
    batch: tuple[int, ...] = ()


# The modules around a leaf, the innermost last.
Modules = Callable[[Path], list[Any]]


def open_model(model: Any) -> tuple[Any, Modules]:
    """The parameters of a model, and a function that gives the modules around a leaf."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, nnx.Module):
        modules = dict(nnx.iter_modules(model))
        parameters = nnx.state(model, nnx.Param)
        return parameters, lambda path: _along_graph(modules, path)
    return model, lambda path: _along_tree(model, path)


def _along_graph(modules: dict[tuple[Any, ...], Any], path: Path) -> list[Any]:
    keys = tuple(key.key for key in path.keys if isinstance(key, DictKey))
    return [modules.get(keys[:depth]) for depth in range(len(keys))]


def _along_tree(tree: Any, path: Path) -> list[Any]:
    if not path.keys or "equinox" not in sys.modules:
        return []
    nodes = [tree]
    for key in path.keys[:-1]:
        try:
            nodes.append(_child(nodes[-1], key))
        except (AttributeError, IndexError, KeyError, TypeError):
            return []  # A container that says nothing of how to find what is in it.
    return nodes


def _child(node: Any, key: Any) -> Any:
    match key:
        case GetAttrKey(name=name):
            return getattr(node, name)
        case SequenceKey(idx=index):
            return node[index]
        case DictKey(key=name):
            return node[name]
    raise KeyError(key)


def is_equinox(modules: list[Any]) -> bool:
    """Whether a leaf is in an Equinox module, where the names of Flax mean nothing."""
    return bool(modules) and any(library == "equinox" for library, _ in _types(modules[-1]))


def declared(modules: list[Any], names: tuple[str, ...]) -> Declared | None:
    """What the innermost of the modules around a leaf says of it, None if nothing."""
    if not modules:
        return None
    module, above = modules[-1], modules[-2] if len(modules) > 1 else None
    rule = next((RULES[known] for known in _types(module) if known in RULES), None)
    said = rule(module).get(names[-1]) if rule else None
    is_gates = names[-2:] in (("dense_i", "kernel"), ("dense_h", "kernel"))
    if said and is_gates and ("flax", "RNNCellBase") in _types(above):
        gates = module.out_features // getattr(above, "hidden_features", module.out_features)
        return said._replace(kind=Kernel(0, 1, gates))
    return said


def _types(module: Any) -> list[tuple[str, str]]:
    """The library and the name of each class that a module has."""
    return [(cls.__module__.partition(".")[0], cls.__name__) for cls in type(module).__mro__]


def _linear(m: Any) -> dict[str, Declared]:
    return {
        "kernel": Declared(Kernel(0, 1), (m.in_features, m.out_features)),
        "bias": Declared("vector", (m.out_features,)),
    }


def _linear_general(m: Any) -> dict[str, Declared]:
    batch = tuple(m.batch_axis.values())
    sizes = (*batch, *m.in_features, *m.out_features)
    axes = tuple(range(len(sizes)))
    first, last = len(batch), len(sizes) - len(m.out_features)
    return {
        "kernel": Declared(Kernel(axes[first:last], axes[last:]), sizes),
        "bias": Declared("vector", (*batch, *m.out_features), axes[:first]),
    }


def _einsum(m: Any) -> dict[str, Declared]:
    operands, _, result = m.einsum_str.replace(" ", "").partition("->")
    given, _, kernel = operands.partition(",")
    inputs = tuple(i for i, axis in enumerate(kernel) if axis in given and axis not in result)
    outputs = tuple(i for i, axis in enumerate(kernel) if axis in result and axis not in given)
    is_clear = inputs + outputs and "." not in kernel
    # A bias has the axes of the result that the kernel has.
    batch = tuple(i for i, axis in enumerate(a for a in result if a in kernel) if axis in given)
    return {
        "kernel": Declared(Kernel(inputs, outputs) if is_clear else None, tuple(m.kernel_shape)),
        "bias": Declared("vector", tuple(m.bias_shape or ()), batch if is_clear else ()),
    }


def _conv(m: Any) -> dict[str, Declared]:
    groups = getattr(m, "feature_group_count", 1)
    n_in, n_out = m.in_features // groups, m.out_features
    *places, first, last = range(len(m.kernel_size) + 2)
    if getattr(m, "transpose_kernel", False):
        kernel, sizes = Kernel((*places, last), first), (*m.kernel_size, n_out, n_in)
    else:
        kernel, sizes = Kernel((*places, first), last, groups), (*m.kernel_size, n_in, n_out)
    return {"kernel": Declared(kernel, sizes), "bias": Declared("vector", (n_out,))}


def _embed(m: Any) -> dict[str, Declared]:
    return {"embedding": Declared("embedding", (m.num_embeddings, m.features))}


def _norm(m: Any) -> dict[str, Declared]:
    n = m.num_features if hasattr(m, "num_features") else m.num_groups * m.group_size
    return dict.fromkeys(("scale", "bias"), Declared("vector", (n,)))


def _lora(m: Any) -> dict[str, Declared]:
    return {
        "lora_a": Declared(Kernel(0, 1), (m.in_features, None)),
        "lora_b": Declared(Kernel(0, 1), (None, m.out_features)),
    }


def _equinox_linear(m: Any) -> dict[str, Declared]:
    n_in, n_out = (1 if n == "scalar" else n for n in (m.in_features, m.out_features))
    return {
        "weight": Declared(Kernel(1, 0), (n_out, n_in)),
        "bias": Declared("vector", (n_out,)),
    }


def _equinox_conv(m: Any) -> dict[str, Declared]:
    sizes = (m.out_channels, m.in_channels // m.groups, *m.kernel_size)
    kernel = Kernel(tuple(range(1, len(sizes))), 0, m.groups)
    return {
        "weight": Declared(kernel, sizes),
        "bias": Declared("vector", (m.out_channels, *(1 for _ in m.kernel_size))),
    }


def _equinox_embedding(m: Any) -> dict[str, Declared]:
    return {"weight": Declared("embedding", (m.num_embeddings, m.embedding_size))}


def _equinox_cell(m: Any) -> dict[str, Declared]:
    gates = 4 if ("equinox", "LSTMCell") in _types(m) else 3
    n, kernel = m.hidden_size, Kernel(1, 0, gates)
    return {
        "weight_ih": Declared(kernel, (gates * n, m.input_size)),
        "weight_hh": Declared(kernel, (gates * n, n)),
        "bias": Declared("vector", (gates * n,)),
        "bias_n": Declared("vector", (n,)),
    }


def _equinox_norm(m: Any) -> dict[str, Declared]:
    names = ("shape", "channels", "input_size")
    sizes = next(getattr(m, name) for name in names if hasattr(m, name))
    sizes = sizes if isinstance(sizes, tuple) else (sizes,)
    return dict.fromkeys(("weight", "bias"), Declared("vector", sizes))


RULES: dict[tuple[str, str], Callable[[Any], dict[str, Declared]]] = {
    ("flax", "Linear"): _linear,
    ("flax", "LinearGeneral"): _linear_general,
    ("flax", "Einsum"): _einsum,
    ("flax", "Conv"): _conv,
    ("flax", "ConvTranspose"): _conv,
    ("flax", "Embed"): _embed,
    ("flax", "LoRA"): _lora,
    **{("flax", f"{kind}Norm"): _norm for kind in ("Batch", "Layer", "RMS", "Group", "Instance")},
    ("equinox", "Linear"): _equinox_linear,
    ("equinox", "Conv"): _equinox_conv,
    ("equinox", "ConvTranspose"): _equinox_conv,
    ("equinox", "Embedding"): _equinox_embedding,
    ("equinox", "GRUCell"): _equinox_cell,
    ("equinox", "LSTMCell"): _equinox_cell,
    **{("equinox", f"{kind}Norm"): _equinox_norm for kind in ("Batch", "Layer", "RMS", "Group")},
}
