"""`layers_table`: what each leaf of a model is, and what a step does to it, to look at."""

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_unitscale.layers import Layer, Layers, layers_in, layers_of
from optax_unitscale.plot import printed_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["layers_table"]

# What `unit_muon` makes of a leaf's momentum.
GETS = {"kernel": "orthogonal", "embedding": "unit rows", "vector": "a tenth of unit norm"}


def layers_table(layers_or_params: Any) -> "Table":
    """What each leaf of a model is, what `unit_muon` makes of its step, and how long that is.

    Args:
      layers_or_params: what `layers_of` returned, or what it takes: a model or its parameters.

    Returns:
      A `rich.table.Table`, which a notebook shows as it is, `print` as text and `rich.print` in
      colour. The axes of a kernel are those of its inputs → those of its outputs. The last column
      is a step at a learning rate of 1: the spectral norm of a kernel, the norm of each row of an
      embedding, that of a vector; for a stack or blocks, of each. Where parameters are given, it
      also says which kernels are zero: they have no norm that `keep_norm` could keep.

    Raises:
      ModuleNotFoundError: rich is not installed.
      ValueError: as `layers_of`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_unitscale import layers_table
      >>> params = {"up": {"kernel": jnp.ones((16, 64)), "bias": jnp.zeros(64)}}
      >>> print(layers_table({**params, "down": {"kernel": jnp.zeros((64, 16))}}))
      leaf          shape      kind     axes    unit_muon              step
      ────────────────────────────────────────────────────────────────────────────────────
      down/kernel   (64, 16)   kernel   0 → 1   orthogonal              0.5   zero at init
      up/bias       (64,)      vector   0       a tenth of unit norm    0.8
      up/kernel     (16, 64)   kernel   0 → 1   orthogonal                2
      zero at init: keep_norm passes it through
    """
    zeros: dict[str, str] = {}
    if isinstance(layers_or_params, Layers):
        layers = layers_or_params
    else:
        layers = layers_of(layers_or_params)
        zeros = {
            path.name: _zeros(x, layer)
            for path, x, layer in layers_in("layers_table", layers, layers_or_params)
        }
    table = printed_table("layers_table")
    from rich.text import Text

    table.add_column("leaf", overflow="fold")
    for heading in ("shape", "kind", "axes", "unit_muon"):
        table.add_column(heading, no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    if any(zeros.values()):
        table.add_column("", no_wrap=True)
        table.caption = "zero at init: keep_norm passes it through"
    for name, layer in layers.items():
        shape = layers.shapes[name]
        step = f"{_step(layer, shape):.3g}"
        cells = [str(shape), layer.kind, _axes(layer), GETS[layer.kind], step, zeros.get(name, "")]
        table.add_row(Text(name), *cells[: len(table.columns) - 1])
    return table


def _step(layer: Layer, shape: tuple[int, ...]) -> float:
    fan_in, fan_out = layer.fans(shape)
    return math.sqrt(fan_out / fan_in) * (0.1 if layer.kind == "vector" else 1)


def _axes(layer: Layer) -> str:
    inputs, outputs, batch = (
        " ".join(map(str, axes)) for axes in (layer.inputs, layer.outputs, layer.batch)
    )
    blocks = f" in {layer.blocks} blocks" * (layer.blocks > 1)
    return f"{inputs} → {outputs}".removeprefix(" → ") + blocks + f", batch {batch}" * bool(batch)


def _zeros(x: Any, layer: Layer) -> str:
    """Which kernels of a leaf are zero."""
    is_concrete = isinstance(x, np.ndarray | jax.Array) and not isinstance(x, Tracer)
    if layer.kind != "kernel" or not is_concrete:
        return ""
    is_zero = np.asarray(~jnp.any(x != 0, layer.inputs + layer.outputs))
    if is_zero.all():
        return "zero at init"
    return f"zero at init: {is_zero.sum()} of {is_zero.size}" if is_zero.any() else ""
