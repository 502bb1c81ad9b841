"""What the name and the shape of a leaf say about it, by the conventions of Flax and Haiku."""

import re
from collections.abc import Mapping

from optax_unitscale.overrides import Kernel, Kind, Shape

__all__ = ["kind_by_name"]

PROJECTIONS = ("query", "key", "value")


def kind_by_name(name: str, shapes: Mapping[str, Shape], is_flax: bool = True) -> Kind | None:
    """What a leaf is, None where that is not certain.

    Args:
      name: such as "blocks/0/attention/query/kernel".
      shapes: those of all leaves by name, without the axes of stacked layers.
      is_flax: False where the names of kernels mean nothing.
    """
    shape = shapes[name]
    module, _, leaf = name.rpartition("/")
    is_flat = shape[:1] == (1,) and sum(size != 1 for size in shape) < 2
    if len(shape) < 2:
        return "vector"
    if leaf.endswith(("embedding", "embeddings")):
        return "embedding" if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1) else None
    if leaf in ("kernel", "w", "w_i", "w_h"):
        return _kernel(module, leaf, shapes) if is_flax else None
    if leaf.endswith(("lora_a", "lora_b")):
        return _low_rank(name, shapes) if is_flax else None
    if leaf in ("bias", "b", "scale", "offset"):
        return "vector" if is_flat or _is_bias_of_heads(name, shapes) else None
    # Such as the (1, 1, features) of a class token, in which there is no matrix.
    return "vector" if is_flat and len(shape) > 2 else None


def _kernel(module: str, leaf: str, shapes: Mapping[str, Shape]) -> Kind | None:
    shape = shapes[_join(module, leaf)]
    above, _, own = module.rpartition("/")
    every = tuple(range(len(shape)))
    if "einsum" in own.lower():  # In which the output may come first.
        return None
    if len(shape) == 2 and not _is_conv(own):
        return Kernel(0, 1, _gates(module, leaf, shapes))
    if own in (*PROJECTIONS, "out") and _is_attention(above, own, shapes):
        return Kernel((0, 1), 2) if own == "out" else Kernel(0, (1, 2))
    *_, n_in, n_out = shape
    if n_in == 1 and n_out != 1:  # A depthwise convolution, or one that sees a single channel.
        return None
    # A bias of one axis shows that nothing is stacked, and which axis comes out.
    bias = shapes.get(_join(module, "b" if leaf == "w" else "bias"))
    if "transpose" in own.lower() and n_in == n_out:  # Either can be first.
        return None
    is_conv = _is_conv(own) and 3 <= len(shape) <= 5 and bias is None
    return Kernel(every[:-1], every[-1]) if is_conv or bias == (n_out,) else None


def _join(*names: str) -> str:
    return "/".join(filter(None, names))


def _is_conv(module: str) -> bool:
    """For Conv, Conv_0, conv1, conv2_d, conv_proj, and not for ConvNeXt or ConvTranspose."""
    words = module.lower().split("_")
    is_any = any(re.fullmatch(r"conv(olution)?\d*d?", word) for word in words)
    return is_any and "transpose" not in words


def _is_attention(above: str, own: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether kernels of rank 3 have axes of heads, rather than of stacked layers.

    As the shapes of query, key, value and out show together, or a projection's bias does.
    """

    def shape_of(module: str, leaf: str = "kernel") -> Shape:
        return shapes.get(_join(above, module, leaf), ())

    if own != "out" and shape_of(own, "bias") == shape_of(own)[1:]:
        return True
    query, key, value, out = (shape_of(module) for module in (*PROJECTIONS, "out"))
    if not len(query) == len(key) == len(value) == len(out) == 3:
        return False
    # Several query heads may share a key and a value.
    return query[1:] == out[:2] and key[1:] == value[1:] and query[2] == key[2]


def _is_bias_of_heads(name: str, shapes: Mapping[str, Shape]) -> bool:
    module = name.rpartition("/")[0]
    kernel = shapes.get(f"{module}/kernel", ())
    own = module.rpartition("/")[2]
    return own in PROJECTIONS and len(kernel) == 3 and kernel[1:] == shapes[name]


def _gates(module: str, leaf: str, shapes: Mapping[str, Shape]) -> int:
    """How many gates of a recurrent cell lie side by side in a kernel, 1 in any other."""
    above, _, own = module.rpartition("/")
    if re.search(r"(^|/)lstm(_\d+)?/linear$", module):  # Haiku's has its inputs side by side too.
        return 4
    if leaf in ("w_i", "w_h"):  # Haiku's GRU.
        recurrent = shapes.get(_join(module, "w_h"), ())
    elif own in ("dense_i", "dense_h"):  # Flax NNX.
        recurrent = shapes.get(_join(above, "dense_h", leaf), ())
    else:
        return 1
    is_recurrent = len(recurrent) == 2 and recurrent[1] % recurrent[0] == 0
    return recurrent[1] // recurrent[0] if is_recurrent else 1


def _low_rank(name: str, shapes: Mapping[str, Shape]) -> Kind | None:
    """Of a LoRA pair, whose common axis is the last of `a` and the first of `b`."""
    shape, last = shapes[name], len(shapes[name]) - 1
    a, b = (shapes.get(f"{name[:-1]}{which}", (0,) * 2) for which in "ab")
    if min(len(a), len(b)) != 2 or (0 not in (*a, *b) and a[-1] != b[0]):
        return None  # Both have an axis more: of stacked layers, perhaps.
    if name.endswith("a"):
        return Kernel(tuple(range(last)), last)
    return Kernel(0, tuple(range(1, len(shape))))
