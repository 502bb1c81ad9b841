"""What stands in a compiled program: what devices send each other, multiply, and read."""

import collections as counts
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Instruction(NamedTuple):
    """`%name = type opcode(%operand, ...), attributes`; a parameter's operand is its number."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Collective(NamedTuple):
    """What `group` devices do together; `inputs`: dtypes and sizes of what one of them puts in."""

    kind: str
    inputs: tuple[tuple[str, int], ...]
    group: int

    @property
    def input_bytes(self) -> int:
        """What one device puts in."""
        return _bytes(self.inputs)


def collectives(program: str, devices: int) -> list[Collective]:
    """All of a program's text, compiled for so many devices, each as often as it runs.

    One that is cut into pieces counts once.
    """
    found: dict[object, tuple[Collective, int]] = {}
    computations = _computations(program)
    runs = _runs(program, computations)
    for computation, instructions in computations.items():
        types = {x.name: x.type for x in instructions}
        for x in instructions:
            kind = x.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            inputs = tuple(shape for name in x.operands for shape in _shapes(types[name]))
            # The pieces of one have a chain in common, whose copies all stand in the program, also
            # in loops that run while it is under way.
            chain = re.search(r'chain_id="(\d+)"', x.attributes)
            key = (kind, chain[1]) if chain else x.name
            times = min(runs[computation], found[key][1] if key in found else math.inf)
            found[key] = Collective(kind, inputs, _group(x, devices)), int(times)
    return [x for x, times in found.values() for _ in range(times)]


def wire_bytes(collective: Collective) -> float:
    """What each device receives, where a ring or a tree of rings does the work."""
    size, others = collective.input_bytes, collective.group - 1
    if collective.kind == "all-gather":
        return size * others
    if collective.kind.startswith("collective"):
        return size
    share = size * others / collective.group
    return 2 * share if collective.kind == "all-reduce" else share


def product_flops(program: str) -> int:
    """The additions and multiplications of all matrix products that one device computes."""
    computations = _computations(program)
    runs = _runs(program, computations)
    total = 0
    for computation, instructions in computations.items():
        types = {x.name: x.type for x in instructions}
        for x in instructions:
            # To XLA:TPU a product is a convolution; with a window it would be more than that.
            if x.opcode == "dot" or (x.opcode == "convolution" and "window=" not in x.attributes):
                sides = [_dimensions(types[name]) for name in (*x.operands, x.name)]
                each = re.search(r"lhs_batch_dims={([\d,]+)}", x.attributes)
                batch = [sides[0][int(axis)] for axis in each[1].split(",")] if each else []
                # Of m by k and k by n elements, which make m by n, as often as `batch` says.
                size = math.prod(map(math.prod, sides)) // math.prod(batch)
                total += runs[computation] * 2 * math.isqrt(size)
            elif x.opcode == "convolution":
                raise ValueError(f"{x.name} is not known to be a product of matrices")
    return total


def all_product_flops(jaxpr: Any) -> int:
    """The same of a whole computation, before it is compiled and laid over devices."""
    total = 0
    for equation in jaxpr.eqns:
        name, options = equation.primitive.name, equation.params
        if name == "dot_general":
            (axes, _), _ = options["dimension_numbers"]
            size = math.prod(equation.outvars[0].aval.shape)
            total += 2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in axes)
            continue
        values = [x for y in options.values() for x in (y if isinstance(y, tuple) else (y,))]
        inner = [getattr(x, "jaxpr", x) for x in values if hasattr(getattr(x, "jaxpr", x), "eqns")]
        # Of a branch one side runs.
        each = max(map(all_product_flops, inner), default=0)
        if name == "while" and each:
            raise ValueError("a loop with products has no count that is known")
        total += each * (options["length"] if name == "scan" else 1)
    return total


def reads(program: str, leaves: int) -> float:
    """How often a program reads its first `leaves` parameters from main memory: bytes a byte.

    What was copied into on-chip memory is not read from there: of a leaf that is copied once and
    used twice only the copy counts.
    """
    entry = _computations(program)[_entry(program)]
    sizes = {
        x.name: _bytes(_shapes(x.type)[:1])
        for x in entry
        if x.opcode == "parameter" and int(x.operands[0]) < leaves
    }
    # What each name holds: a parameter, or for a tuple one for each part, and else None.
    held: dict[str, list[str | None]] = {name: [name] for name in sizes}
    total = 0
    for x in entry:
        used = [name for operand in x.operands for name in held.get(operand, [None])]
        if x.opcode == "get-tuple-element":
            held[x.name] = used[int(re.findall(r"index=(\d+)", x.attributes)[0]) :][:1]
        elif x.opcode in ("bitcast", "opt-barrier", "tuple"):
            held[x.name] = used
        elif x.opcode in ("slice", "slice-start") and any(used):
            # The type of a start holds those of its operands first.
            first = 1 if x.opcode == "slice-start" else 0
            total += _bytes(_shapes(x.type)[first : first + 1])
        elif x.opcode != "parameter":
            total += sum(sizes[name] for name in set(used) if name)
    return total / sum(sizes.values())


def _entry(program: str) -> str:
    name = re.search(r"^ENTRY %([\w.-]+)", program, re.MULTILINE)
    if not name:
        raise ValueError("the program has no ENTRY computation")
    return name[1]


def _runs(program: str, computations: dict[str, list[Instruction]]) -> counts.Counter[str]:
    """How often each computation runs; of a branch each side counts."""
    found: counts.Counter[str] = counts.Counter()

    def visit(name: str, times: int) -> None:
        found[name] += times
        for x in computations[name]:
            called = [y for y in re.findall(r"%([\w.-]+)", x.attributes) if y in computations]
            again = times * _trips(x, computations) if x.opcode == "while" else times
            for other in called:
                visit(other, again)

    visit(_entry(program), 1)
    return found


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often a loop's body runs, which counts from 0."""
    if known := re.search(r'"known_trip_count":{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    # XLA:TPU does not write it down, but compares a counter with a constant.
    condition = re.findall(r"condition=%([\w.-]+)", loop.attributes)[0]
    ends = {x.name: x.operands[0] for x in computations[condition] if x.opcode == "constant"}
    last = computations[condition][-1]
    bounds = [int(ends[name]) for name in last.operands if name in ends]
    if last.opcode != "compare" or "direction=LT" not in last.attributes or len(bounds) != 1:
        raise ValueError(f"{loop.name} has no count that is known")
    return bounds[0]


def _computations(program: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            found[head[1]] = []
        elif body := re.match(
            r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\(([^)]*)\)(.*)", line
        ):
            name, type_, opcode, operands, attributes = body.groups()
            names = tuple(name.lstrip("%") for name in operands.split(", "))
            found[next(reversed(found))].append(Instruction(name, type_, opcode, names, attributes))
    return found


def _shapes(type_: str) -> list[tuple[str, int]]:
    """The dtypes and the numbers of elements in a type."""
    found = re.findall(r"\b([a-z]+\d*\w*)(\[[\d,]*\])", type_)
    return [(dtype, math.prod(_dimensions(sizes))) for dtype, sizes in found]


def _dimensions(type_: str) -> list[int]:
    return [int(n) for n in re.findall(r"\[([\d,]*)\]", type_)[0].split(",") if n]


def _bytes(shapes: Sequence[tuple[str, int]]) -> int:
    # The first number in a dtype's name is its bits: f32, bf16, f8e4m3fn; pred has none.
    bits = {dtype: int((re.findall(r"\d+", dtype) or ["8"])[0]) for dtype, _ in shapes}
    return sum(bits[dtype] * size // 8 for dtype, size in shapes)


def _group(instruction: Instruction, devices: int) -> int:
    """How many devices take part, from any of the ways in which XLA writes it."""
    text = instruction.attributes
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"('\w+')=(\d+)", mesh[1])}
        parts = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return listed[1].count(",") + 1 if listed else devices
