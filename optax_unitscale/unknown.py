"""The error about leaves that can be several things: all of them, and the lines to write."""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from optax_unitscale.conventions import KERNELS, VECTORS, split
from optax_unitscale.overrides import Kernel, Kind, Shape, as_ints, matches, of_stack

__all__ = ["explain"]


APART, TOGETHER = "a kernel for each projection, of one width", "one kernel of all projections"
# What a leaf can be, the likeliest first, and what each means.
Readings = list[tuple[Kind, str]]


def explain(
    caller: str,
    unknown: Sequence[str],
    shapes: Mapping[str, Shape],
    typed: set[str],
    fused: Mapping[str, Kernel],
    by_name: Callable[[str, Mapping[str, Shape]], Kind | None],
) -> str:
    """Lists what is unknown, and shows how to say what it is.

    Args:
      caller: whose error it is.
      unknown: the names of the leaves.
      shapes: those of all leaves.
      typed: leaves whose modules say what they are; unknown is which axes are stacked layers.
      fused: kernels that may hold several projections, as one kernel.
      by_name: what a leaf of a name and a shape is, or None.
    """
    lines = [f"{caller}: the name and the shape of these leaves do not show what they are:"]
    lines += [f"  {name} {shapes[name]}" for name in unknown]
    stacks = _stacks([name for name in unknown if name not in fused], shapes, typed)
    axes = {name: () if name in fused else _stack_of(name, stacks) for name in shapes}
    single = {
        name: tuple(size for axis, size in enumerate(shape) if axis not in axes[name])
        for name, shape in shapes.items()
    }
    readings: dict[str, Readings] = {}
    for name in unknown:
        kind = fused.get(name) or by_name(name, single)
        found = _readings(name, single[name], kind) if kind or name not in typed else []
        if found:
            readings[name] = [
                (_in_stack(kind, shapes[name], axes[name]), means) for kind, means in found
            ]
    entries: dict[str, Readings] = {}
    for name, found in readings.items():
        if not any(matches(pattern, name) for pattern in entries):
            entries[_pattern(name, readings, shapes)] = found
    shown = ", ".join(f'"{pattern}": {_written(can[0][0])}' for pattern, can in entries.items())
    said = [f"{{{shown}}}"] if entries else []
    patterns = {f"{above}/**": axis for above, axis in stacks.items()}
    for name in unknown:
        if name in typed and not any(matches(each, name) for each in (*patterns, *entries)):
            patterns[name] = 0
    if patterns:
        every = ", ".join(f'"{pattern}": {axis}' for pattern, axis in patterns.items())
        is_first = [*patterns.values()] == [0]
        said.append(f'stacked="{next(iter(patterns))}"' if is_first else f"stacked={{{every}}}")
    argument = "" if caller == "layers_of" else "layers="
    model = "model" if typed else "params"
    lines.append(f"Write, for example, {argument}layers_of({model}, {', '.join(said)}).")
    choices = [(pattern, *one) for pattern, can in entries.items() if len(can) > 1 for one in can]
    if choices:
        lines.append("A leaf can be two things; for each, keep the line that is right:")
        lines += [
            f'  "{pattern}": {_written(kind)},  # {means}' for pattern, kind, means in choices
        ]
    if "Kernel(" in shown:
        lines.append("Kernel is a class of optax_unitscale.")
    if "flax.nnx" in sys.modules and not typed and len(fused) < len(unknown):
        lines.append("A Flax NNX model shows more than its parameters do: layers_of(model).")
    if all(name.rpartition("/")[2].isdigit() for name in unknown):
        lines.append(
            "Items of a list have no names. Give Keras variables as a dict: "
            "{v.path: v.value for v in model.trainable_variables}."
        )
    return "\n".join(lines)


def _readings(name: str, shape: Shape, kind: Kind | None) -> Readings:
    """What a leaf of one layer can be; nothing if it is of the kind, without a doubt."""
    *_, own, leaf = ["", *name.split("/")]
    *most, last = range(len(shape))
    first, *rest = range(len(shape))
    if kind:
        return _of_fused(name, shape, kind) if isinstance(kind, Kernel) else []
    if _is_vector(name):
        return [("vector", "")]
    if leaf.startswith("pos") or ("embed" in leaf and "unembed" not in leaf):
        return [("embedding", "")]
    conv = Kernel(tuple(most), last)
    if leaf in KERNELS and len(most) > 1 and shape[-2] == 1:
        depthwise = conv._replace(blocks=shape[last])
        found: Readings = [
            (conv, "an ordinary one, of one channel"),
            (depthwise, "depthwise: a kernel for each channel"),
        ]
        return found[::-1] if re.search(r"depth|dw", name.lower()) else found
    if "transpose" in name.lower() and len(most) > 1:
        swapped = Kernel((*most[:-1], last), last - 1)
        return [(conv, "(..., in, out)"), (swapped, "(..., out, in), as in Keras")]
    if "depthwise" in name.lower() and len(most) > 1:
        each = Kernel(tuple(most[:-1]), last)
        return [(each, "(..., channels, multiplier), as in Keras"), (conv, "(..., in, out)")]
    if "conv" in name.lower():
        return [(conv, "")]
    forward, backward = Kernel(first, tuple(rest)), Kernel(tuple(rest), first)
    if 1 in shape and leaf not in KERNELS and leaf != "weight" and not leaf.isdigit():
        return [("vector", "one vector"), ("embedding", "a table, (rows, features)")]
    if leaf.isdigit():
        return [(forward, "(in, out)"), (backward, "(out, in), as in PyTorch and Equinox")]
    if leaf == "weight":
        return [(backward, "(out, in), as in PyTorch and Equinox"), (forward, "(in, out)")]
    if leaf in KERNELS and len(rest) == 1:
        return [(forward, "(in, out)"), (backward, "(out, in)")]
    if len(rest) == 1:
        return [(forward, "a kernel, (in, out)"), ("embedding", "a table, (rows, features)")]
    # Such as (3, in, heads, features), or (3, heads, in, features) in einsums.
    given = 0 if shape[0] > 3 else 2 if "einsum" in own and len(shape) == 4 else 1
    one = Kernel(given, tuple(axis for axis in range(len(shape)) if axis != given))
    if found := _of_fused(name, shape, one):
        return found
    batch = Kernel(last - 1, last)
    if own == "out":
        return [(conv, "a kernel, (heads, features, out)"), (batch, "several kernels, (in, out)")]
    found = [(forward, "a kernel, (in, heads, features)"), (batch, "several kernels, (in, out)")]
    return found[::-1] if re.search(r"expert|moe", name.lower()) else found


def _of_fused(name: str, shape: Shape, one: Kernel) -> Readings:
    """What a kernel can be that may hold several projections; nothing if it holds none."""
    apart = split(name, shape, one)
    if apart is None:
        return []
    n_in, n_out = (
        math.prod(shape[axis] for axis in as_ints(axes)) for axes in (apart.inputs, apart.outputs)
    )
    found: Readings = [(apart, APART), (one, TOGETHER)]
    # Where queries share keys and values, these are narrower: no blocks of one width.
    return found[::-1] if apart.blocks == 3 and n_out < 3 * n_in else found


def _in_stack(kind: Kind, shape: Shape, stack: tuple[int, ...]) -> Kind:
    if not isinstance(kind, Kernel):
        return kind
    inputs, outputs = (of_stack(axes, len(shape), stack) for axes in (kind.inputs, kind.outputs))
    return Kernel(inputs, outputs, kind.blocks)


def _written(kind: Kind) -> str:
    """As Python, with what can be left out left out."""
    if not isinstance(kind, Kernel):
        return f'"{kind}"'
    inputs, outputs = (
        axes[0] if isinstance(axes, tuple) and len(axes) == 1 else axes
        for axes in (kind.inputs, kind.outputs)
    )
    blocks = f", blocks={kind.blocks}" if kind.blocks > 1 else ""
    return f"Kernel(inputs={inputs}, outputs={outputs}{blocks})"


def _is_vector(name: str) -> bool:
    return name.rpartition("/")[2] in VECTORS


def _pattern(name: str, readings: Mapping[str, Readings], shapes: Mapping[str, Shape]) -> str:
    """A short one that fits only leaves which can be the same."""
    *_, own, leaf = ["", *name.split("/")]
    numbered = "/".join("*" if part.isdigit() else part for part in name.split("/"))
    for pattern in (f"**/{own}/{leaf}", numbered):
        fits = [other for other in shapes if matches(pattern, other)]
        is_fit = all(readings.get(other) == readings[name] for other in fits)
        if is_fit and own and not own.isdigit():
            return pattern
    return name


def _stacks(unknown: Sequence[str], shapes: Mapping[str, Shape], typed: set[str]) -> dict[str, int]:
    """Subtrees in which all leaves may well be stacked along one axis, 0 or 1."""
    stacks: dict[str, int] = {}
    for name in unknown:
        if any(name.startswith(f"{above}/") for above in stacks):
            continue
        for above in _above(name):
            inside = {n: shape for n, shape in shapes.items() if n.startswith(f"{above}/")}
            first, *others = inside.values()
            same = [a for a in (0, 1) if all(s[a : a + 1] == first[a : a + 1] for s in others)]
            # One layer's matrix is no stack of vectors.
            is_stack = all(len(s) > 2 or n in typed or _is_vector(n) for n, s in inside.items())
            if same and others and is_stack:
                stacks[above] = same[0]
                break
    return stacks


def _above(name: str) -> Iterator[str]:
    """The subtrees that a leaf is in, from the largest."""
    names = name.split("/")
    return ("/".join(names[:depth]) for depth in range(1, len(names)))


def _stack_of(name: str, stacks: Mapping[str, int]) -> tuple[int, ...]:
    return next(((axis,) for above, axis in stacks.items() if name.startswith(f"{above}/")), ())
