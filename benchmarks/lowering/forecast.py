"""What share of a training step `unit_scale` takes on machines of any size: arithmetic, no run."""

import math
from typing import Any, NamedTuple

from benchmarks.show import markdown

COUNTS = (256, 4096, 65536)
# Parameters, gradient and momentum in float32, without which no step begins.
BYTES_A_PARAMETER = 12
# What Llama 3 405B had of the peak on 8192 to 16384 H100: 38 to 43 %, arXiv 2407.21783, table 4.
UTILISATION = 0.4


class Chip(NamedTuple):
    """Published figures, but for the latencies, in seconds, which are meant to be too high."""

    topology: str
    flops: float  # A second, in bfloat16.
    capacity: float  # In bytes.
    memory: float  # Bytes a second, as of the links to other chips.
    link: float
    domain: int  # How many chips those links join,
    dimensions: int  # as a torus of so many, or by a switch where that is 0.
    hop: float  # Along one link of the domain.
    network: float  # Of one message of a few kB between domains.
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_GPU = "https://www.nvidia.com/en-us/data-center/h100/"
_V5E = (197e12, 16e9, 819e9, 400e9, 256, 2, 1e-6, 50e-6)
_V6E = (918e12, 32e9, 1638e9, 800e9, 256, 2, 1e-6, 50e-6)
_V5P = (459e12, 95 * 2**30, 2765e9, 1200e9, 6144, 3, 1e-6, 50e-6)
CHIPS = {
    "TPU v5e": Chip("TPU v5e, 256 chips", *_V5E, _TPU + "v5e"),
    "TPU v6e": Chip("TPU v6e, 256 chips", *_V6E, _TPU + "v6e"),
    "TPU v5p": Chip("TPU v5p, 4096 chips", *_V5P, _TPU + "v5p"),
    "H100": Chip("H100, 256 GPUs", 989e12, 80e9, 3350e9, 900e9, 8, 0, 5e-6, 10e-6, _GPU),
}


class Model(NamedTuple):
    """A model's parameters, its depth, the tokens of a batch, and who trained one alike."""

    parameters: float
    depth: int
    tokens: float
    source: str


MODELS = {
    "1 B": Model(1e9, 22, 2e6, "TinyLlama 1.1B, arXiv 2401.02385"),
    "70 B": Model(70e9, 80, 4e6, "Llama 2 70B, arXiv 2307.09288"),
    "1 T": Model(1e12, 128, 16e6, "the batch of Llama 3 405B, arXiv 2407.21783"),
}
FORMULA = {
    "share": "update / (step + update)",
    "step": "6 * parameters * tokens / (chips * flops * utilisation)",
    "update": "memory_time + all_reduces * latency + wire_time",
    "memory_time": "(2 + 1) * 4 * parameters / (chips * memory)",
    "wire_time": "2 * 12 * leaves / link",
    "latency": "2 * hops * hop + 2 * max(0, ceil(log2(chips / domain))) * network",
    "hops": "dimensions * n ** (1 / dimensions) / 2 in a torus of n = min(chips, domain), else 1",
    "leaves": "12 * depth + 6",
}


def share(chip: Chip, model: Model, chips: int, all_reduces: int) -> dict[str, float]:
    """By `FORMULA`: seconds of a step without the update, and of that, and the latter's share."""
    step = 6 * model.parameters * model.tokens / (chips * chip.flops * UTILISATION)
    memory_time = 3 * 4 * model.parameters / (chips * chip.memory)
    near = min(chips, chip.domain)
    d = chip.dimensions
    hops = d * near ** (1 / d) / 2 if d else 1.0
    far = 2 * max(0, math.ceil(math.log2(chips / chip.domain))) * chip.network
    latency = 2 * hops * chip.hop + far
    wire_time = 2 * 12 * (12 * model.depth + 6) / chip.link
    update = memory_time + all_reduces * latency + wire_time
    return {"step": step, "update": update, "share": update / (step + update)}


def shares(results: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """An entry for every chip that was compiled for, model and count; no share where none fits."""
    entries = []
    for name, chip in CHIPS.items():
        compiled = results.get(chip.topology, {}).get("unit_scale()")
        if compiled is None:
            continue
        all_reduces = compiled["collectives"].get("all-reduce", 0)
        for size, model in MODELS.items():
            for chips in COUNTS:
                entry: dict[str, Any] = {"chip": name, "parameters": size, "chips": chips}
                if BYTES_A_PARAMETER * model.parameters <= chips * chip.capacity:
                    found = share(chip, model, chips, all_reduces)
                    entry |= {key: float(f"{value:.3g}") for key, value in found.items()}
                entries.append(entry)
    return entries


def as_markdown(entries: list[dict[str, Any]]) -> str:
    """The formula, its inputs and a table of the shares."""
    cells: dict[tuple[str, str], list[str]] = {}
    for x in entries:
        text = f"{100 * x['share']:.2g} %" if "share" in x else "does not fit"
        cells.setdefault((x["chip"], x["parameters"]), []).append(text)
    counts = [f"{count:,} chips" for count in COUNTS]
    models = [[k, f"{m.depth}", f"{m.tokens / 1e6:g} M", m.source] for k, m in MODELS.items()]
    units = {"flops": 1e-12, "memory": 1e-9, "link": 1e-9, "hop": 1e6, "network": 1e6}
    chips = []
    for name, chip in CHIPS.items():
        said = {field: f"{getattr(chip, field) * by:g}" for field, by in units.items()}
        said |= {"domain": f"{chip.domain:,}", "source": f"<{chip.source}>"}
        fields = ("flops", "memory", "link", "domain", "hop", "network", "source")
        chips.append([name, *(said[field] for field in fields)])
    speeds = ["TFLOP/s", "memory GB/s", "link GB/s"]
    chip_heads = ["chip", *speeds, "domain", "hop µs", "network µs", "source"]
    formulas = "\n".join(f"{name} = {formula}" for name, formula in FORMULA.items())
    return f"""\
# What share of a training step `unit_scale()` takes

Computed by `python -m benchmarks lower` from the compiled programs in `lower.json`,
which give `all_reduces`, and from published figures; nothing was timed. The gradient is
read twice and written once, as where a device's part does not fit on the chip, and the
l2 norm sends three float32 numbers a leaf.

```
{formulas}
```

{markdown(["chip", "parameters", *counts], [[*k, *row] for k, row in cells.items()], 2)}
Where the share is large, a step takes milliseconds or less: the batch leaves each chip a
few dozen tokens, and every other collective of the step waits as long.

`utilisation` is {UTILISATION}, as Llama 3 405B reports 38 to 43 % (arXiv 2407.21783).
A model fits where there are {BYTES_A_PARAMETER} bytes a parameter.

{markdown(["parameters", "depth", "tokens a step", "as"], models, 1, 1)}
Latencies are assumed, not published, and meant to be too high: `hop` of a link within a
domain, `network` of a message of a few kB between two.

{markdown(chip_heads, chips, 1, 1)}"""
