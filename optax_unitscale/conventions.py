"""What the name and the shape of a leaf say about it, by the conventions of Flax and Haiku."""

import math
import re
from collections.abc import Mapping

from optax_unitscale.overrides import Kernel, Kind, Shape, as_ints

__all__ = ["kind_by_name", "split"]

PROJECTIONS = ("query", "key", "value")
VECTORS = ("bias", "b", "scale", "offset")
KERNELS = ("kernel", "w", "w_i", "w_h", "recurrent_kernel")
# Names of kernels that hold query, key and value at once, or key and value.
FUSED = {
    3: r"(.*_)?w?qkv(_.*)?|query_key_value|c_attn|in_proj",
    2: r"(to_|w)?kv(_proj|_einsum)?|key_value",
}
# What a recurrent cell multiplies with its input, and with its state: NNX's, Haiku's, Keras's, and
# the convolutions of Linen's and Haiku's.
CELLS = (
    ("dense_i/kernel", "dense_h/kernel"),
    ("w_i", "w_h"),
    ("kernel", "recurrent_kernel"),
    ("ih/kernel", "hh/kernel"),
    ("input_to_hidden/w", "hidden_to_hidden/w"),
)


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
    if re.search(r"(^|_)embeddings?$", leaf):
        return "embedding" if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1) else None
    if leaf in KERNELS:
        return _kernel(module, leaf, shapes) if is_flax else None
    if leaf.endswith(("lora_a", "lora_b")):
        return _low_rank(name, shapes) if is_flax else None
    if leaf in VECTORS:
        is_vector = is_flat or _is_bias_of_several(module, shape, shapes)
        return "vector" if is_vector else None
    # Such as the (1, 1, features) of a class token, in which there is no matrix.
    return "vector" if is_flat and len(shape) > 2 else None


def split(name: str, shape: Shape, kernel: Kernel) -> Kernel | None:
    """A kernel that may hold query, key and value, as its name says, with each by itself.

    Args:
      name: of the leaf.
      shape: of the leaf.
      kernel: all of them as one kernel.

    Returns:
      None for every other kernel.
    """
    inputs, outputs = as_ints(kernel.inputs), as_ints(kernel.outputs)
    n_in, n_out = (math.prod(shape[axis] for axis in axes) for axes in (inputs, outputs))
    parts = [part.lower() for part in name.split("/") if part not in (*KERNELS, "weight")]
    own = "".join(parts[-1:])
    count = next((n for n, names in FUSED.items() if re.fullmatch(names, own)), 1)
    if count == 1 or (own in ("c_attn", "in_proj") and 3 not in (n_out / n_in, n_in / n_out)):
        return None
    if n_in == count * n_out:  # Hugging Face's GPT-2 has (out, in).
        inputs, outputs = outputs, inputs
    apart = [axis for axis in outputs if shape[axis] == count]
    if apart and len(outputs) > 1:
        return Kernel(inputs, tuple(axis for axis in outputs if axis != apart[0]))
    return None if shape[min(outputs)] % count else Kernel(inputs, outputs, count)


def _kernel(module: str, leaf: str, shapes: Mapping[str, Shape]) -> Kind | None:
    shape = shapes[_join(module, leaf)]
    above, _, own = module.rpartition("/")
    *inputs, output = range(len(shape))
    *_, n_in, n_out = shape
    bias = shapes.get(_join(module, "b" if leaf == "w" else "bias"))
    if own in (*PROJECTIONS, "out") and len(shape) == 3 and _is_attention(above, own, shapes):
        return Kernel((0, 1), 2) if own == "out" else Kernel(0, (1, 2))
    # The gates of a cell show that nothing is stacked.
    gates = _gates(module, leaf, shapes)
    if len(shape) == 2 and gates > 1:
        return Kernel(0, 1, gates)
    # A bias of one axis does too, and which axis is the output.
    if bias not in (None, (n_out,)) or "einsum" in own.lower():
        return None
    if len(shape) == 2:
        return None if _is_conv(own) else Kernel(0, 1)
    # A depthwise convolution or one that sees a single channel; a transposed one, perhaps.
    if (n_in == 1 and n_out != 1 and gates == 1) or ("transpose" in own.lower() and n_in == n_out):
        return None
    # 5 x 3 x 3 may be five layers of 3 x 3.
    is_cube = len(shape) <= 5 and len({*shape[:-2]} - {1}) < 2
    is_known = bias is not None or (_is_conv(own) and is_cube)
    return Kernel(tuple(inputs), output, gates) if is_known else None


def _join(*names: str) -> str:
    return "/".join(filter(None, names))


def _is_conv(module: str) -> bool:
    """For Conv, Conv_0, conv1, conv2_d, conv_proj, and not for ConvNeXt or ConvTranspose."""
    words = module.lower().split("_")
    is_any = any(re.fullmatch(r"conv(olution)?\d*d?", word) for word in words)
    return is_any and {"transpose", "depthwise", "separable"}.isdisjoint(words)


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


def _is_bias_of_several(module: str, shape: Shape, shapes: Mapping[str, Shape]) -> bool:
    """Of heads, or of the two kernels of Keras's GRU."""
    kernel = shapes.get(f"{module}/kernel", ())
    is_of_heads = module.rpartition("/")[2] in PROJECTIONS and len(kernel) == 3
    is_of_pair = _gates(module, "kernel", shapes) > 1
    return (is_of_heads and kernel[1:] == shape) or (is_of_pair and shape == (2, kernel[1]))


def _gates(module: str, leaf: str, shapes: Mapping[str, Shape]) -> int:
    """How many gates of a recurrent cell lie side by side in a kernel, 1 in any other."""
    if leaf == "w" and re.search(r"(^|/)lstm(_\d+)?/linear$", module):
        return 4  # Haiku's, in which the two kernels are one.
    name = _join(module, leaf)
    for of_input, of_state in CELLS:
        for end in (of_input, of_state):
            if name.endswith(end):
                above = name.removesuffix(end)
                given, state = (shapes.get(above + other, ()) for other in (of_input, of_state))
                if len(given) == len(state) > 1 and given[-1] == state[-1]:
                    gates, rest = divmod(state[-1], state[-2])
                    return gates if not rest and gates in (3, 4) else 1
    return 1


def _low_rank(name: str, shapes: Mapping[str, Shape]) -> Kind | None:
    """Of a LoRA pair, whose common axis is the last of `a` and the first of `b`."""
    shape, last = shapes[name], len(shapes[name]) - 1
    a, b = (shapes.get(f"{name[:-1]}{which}", (0,) * 2) for which in "ab")
    if min(len(a), len(b)) != 2 or (0 not in (*a, *b) and a[-1] != b[0]):
        return None  # Both have an axis more: of stacked layers, perhaps.
    if len(shape) > 2 and 0 in (*a, *b):
        return None  # The other one, which would show whether layers are stacked, is not trained.
    if name.endswith("a"):
        return Kernel(tuple(range(last)), last)
    return Kernel(0, tuple(range(1, len(shape))))
