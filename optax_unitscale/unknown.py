"""The error about leaves that can be several things: all of them, and the line to write."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optax_unitscale.overrides import Shape, matches

__all__ = ["explain"]


def explain(
    caller: str,
    unknown: Sequence[str],
    shapes: Mapping[str, Shape],
    typed: set[str],
    by_name: Callable[[str, Mapping[str, Shape]], Any],
) -> str:
    """Lists what is unknown, and shows by example how to say what it is.

    Args:
      caller: whose error it is.
      unknown: the names of the leaves.
      shapes: those of all leaves.
      typed: leaves whose modules say what they are; unknown is which axes are stacked layers.
      by_name: what a leaf of a name and a shape is, or None.
    """
    lines = [f"{caller}: the name and the shape of these leaves do not show what they are:"]
    lines += [f"  {name} {shapes[name]}{_doubt(name, shapes[name])}" for name in unknown]
    stacks = _stacks(unknown, shapes, typed)
    single = {name: _single(name, shape, stacks) for name, shape in shapes.items()}
    entries = {}
    for name in unknown:
        is_said = name in typed or by_name(name, single) is not None
        if not is_said and not any(matches(p, name) for p in entries):
            entries[_pattern(name, unknown, shapes)] = _example(name, shapes[name])
    shown = ", ".join(f'"{pattern}": {kind}' for pattern, kind in entries.items())
    said = [f"{{{shown}}}"] if entries else []
    if stacks:
        axes = ", ".join(f'"{above}/**": {axis}' for above, axis in stacks.items())
        is_first = len(stacks) == 1 and 0 in stacks.values()
        said.append(f'stacked="{next(iter(stacks))}/**"' if is_first else f"stacked={{{axes}}}")
    argument = "" if caller == "layers_of" else "layers="
    model = "model" if typed else "params"
    lines.append(f"Say it, such as {argument}layers_of({model}, {', '.join(said)}).")
    if "flax.nnx" in sys.modules and not typed:
        lines.append("A Flax NNX model in place of its parameters, layers_of(model), shows more.")
    if all(name.rpartition("/")[2].isdigit() for name in unknown):
        lines.append(
            "Items of a list have no names. Where they are those of Keras, give a dict with names: "
            "{v.path: v.value for v in model.trainable_variables}."
        )
    return "\n".join(lines)


def _is_depthwise(name: str, shape: Shape) -> bool:
    return name.endswith(("kernel", "w")) and len(shape) > 2 and shape[-2:-1] == (1,)


def _is_vector(name: str) -> bool:
    return name.rpartition("/")[2] in ("bias", "b", "scale", "offset")


def _doubt(name: str, shape: Shape) -> str:
    return ": depthwise, or on one channel?" if _is_depthwise(name, shape) else ""


def _pattern(name: str, unknown: Sequence[str], shapes: Mapping[str, Shape]) -> str:
    """A short one that fits no leaf which is known, nor one of another rank."""
    *_, own, leaf = ["", *name.split("/")]
    numbered = "/".join("*" if part.isdigit() else part for part in name.split("/"))
    for pattern in (f"**/{own}/{leaf}", numbered):
        fits = [other for other in shapes if matches(pattern, other)]
        is_fit = all(n in unknown and len(shapes[n]) == len(shapes[name]) for n in fits)
        if is_fit and own and not own.isdigit():
            return pattern
    return name


def _example(name: str, shape: Shape) -> str:
    leaf = name.rpartition("/")[2]
    *inputs, last = range(len(shape))
    if _is_vector(name):
        return '"vector"'
    if leaf.startswith("pos") or "embed" in leaf:
        return '"embedding"'
    if _is_depthwise(name, shape) or "conv" in name.lower():
        blocks = f", blocks={shape[last]}" if _is_depthwise(name, shape) else ""
        return f"Kernel(inputs={tuple(inputs)}, outputs={last}{blocks})"
    outputs = tuple(range(1, last + 1)) if last > 1 else last
    return f"Kernel(inputs=0, outputs={outputs})"


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


def _single(name: str, shape: Shape, stacks: Mapping[str, int]) -> Shape:
    axis = next((axis for above, axis in stacks.items() if name.startswith(f"{above}/")), None)
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]
