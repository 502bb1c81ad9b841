"""The error about leaves that can be several things: all of them, and the line to write."""

import sys
from collections.abc import Iterator, Mapping, Sequence

from optax_unitscale.conventions import kind_by_name
from optax_unitscale.overrides import Shape

__all__ = ["explain"]


def explain(
    caller: str, unknown: Sequence[str], shapes: Mapping[str, Shape], has_modules: bool
) -> str:
    """Lists what is unknown, and shows by example how to say what it is."""
    lines = [f"{caller}: the name and the shape of these leaves do not show what they are:"]
    lines += [f"  {name} {shapes[name]}{_doubt(name, shapes[name])}" for name in unknown]
    stacks = _stacks(unknown, shapes)
    single = {name: _single(name, shape, stacks) for name, shape in shapes.items()}
    entries = {}
    for name in unknown:
        if kind_by_name(name, single) is None:
            *_, own, leaf = ["", *name.split("/")]
            pattern = f"**/{own}/{leaf}" if own and not own.isdigit() else f"**/{leaf}"
            entries[pattern if "/" in name else name] = _example(leaf, len(shapes[name]))
    shown = ", ".join(f'"{pattern}": {kind}' for pattern, kind in entries.items())
    said = [f"{{{shown}}}"] if entries else []
    if stacks:
        axes = ", ".join(f'"{above}/**": {axis}' for above, axis in stacks.items())
        is_first = len(stacks) == 1 and 0 in stacks.values()
        said.append(f'stacked="{next(iter(stacks))}/**"' if is_first else f"stacked={{{axes}}}")
    argument = "" if caller == "layers_of" else "layers="
    model = "model" if has_modules else "params"
    lines.append(f"Say it, such as {argument}layers_of({model}, {', '.join(said)}).")
    if "flax.nnx" in sys.modules and not has_modules:
        lines.append("A Flax NNX model in place of its parameters, layers_of(model), shows more.")
    if all(name.rpartition("/")[2].isdigit() for name in unknown):
        lines.append(
            "Items of a list have no names. Where they are those of Keras, give a dict with names: "
            "{v.path: v.value for v in model.trainable_variables}."
        )
    return "\n".join(lines)


def _doubt(name: str, shape: Shape) -> str:
    if not name.endswith(("kernel", "/w")) or len(shape) < 3 or shape[-2:-1] != (1,):
        return ""
    return f": depthwise (blocks={shape[len(shape) - 1]}), or on one channel?"


def _example(leaf: str, ndim: int) -> str:
    if leaf in ("bias", "b", "scale", "offset"):
        return '"vector"'
    if leaf.startswith("pos") or "embed" in leaf:
        return '"embedding"'
    return f"Kernel(inputs=0, outputs={tuple(range(1, ndim)) if ndim > 2 else 1})"


def _stacks(unknown: Sequence[str], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Subtrees with unknown leaves in which all leaves share the size of an axis, 0 or 1."""
    stacks: dict[str, int] = {}
    for name in unknown:
        if any(name.startswith(f"{above}/") for above in stacks):
            continue
        for above in _above(name):
            inside = [shape for other, shape in shapes.items() if other.startswith(f"{above}/")]
            same = [a for a in (0, 1) if all(len(s) > a and s[a] == inside[0][a] for s in inside)]
            if same and len(inside) > 1:
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
