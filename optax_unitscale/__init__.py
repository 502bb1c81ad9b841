"""Unit scale for Optax: gradients, steps and parameters of the norm that you chose."""

from optax_unitscale.clip import clip_norm
from optax_unitscale.history import norm_ratios
from optax_unitscale.layers import Kernel, Layer, Layers, layers_of
from optax_unitscale.observe import gradient_norms, record_norms, recorded_norms
from optax_unitscale.optimizers import unit_muon, unit_sgd
from optax_unitscale.orthogonal import orthogonalize
from optax_unitscale.overrides import stacked
from optax_unitscale.parameters import keep_norm
from optax_unitscale.plot import norms_table, plot_norms
from optax_unitscale.ratios import step_ratios
from optax_unitscale.shape import scale_by_shape
from optax_unitscale.table import layers_table
from optax_unitscale.transform import unit_scale

__all__ = [
    "Kernel",
    "Layer",
    "Layers",
    "clip_norm",
    "gradient_norms",
    "keep_norm",
    "layers_of",
    "layers_table",
    "norm_ratios",
    "norms_table",
    "orthogonalize",
    "plot_norms",
    "record_norms",
    "recorded_norms",
    "scale_by_shape",
    "stacked",
    "step_ratios",
    "unit_muon",
    "unit_scale",
    "unit_sgd",
]
__version__ = "0.1.0"
