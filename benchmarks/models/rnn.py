"""A plain recurrent network, whose gradients explode where its recurrent weights are large."""

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["RNN"]


class RNN(nnx.Module):
    """A recurrent layer of hyperbolic tangents that reads an image, and a linear head."""

    def __init__(self, inputs: int, width: int, gain: float, outputs: int, rngs: nnx.Rngs):
        """Args as named; `gain` is the spectral norm of the initial recurrent weights."""
        self.inputs = inputs
        orthogonal = nnx.initializers.orthogonal(gain)
        cell = nnx.SimpleCell(inputs, width, recurrent_kernel_init=orthogonal, rngs=rngs)
        self.recurrent = nnx.RNN(cell, rngs=rngs)
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images, read `inputs` pixels a step, to logits of shape (batch, outputs)."""
        sequence = images.reshape(len(images), -1, self.inputs)
        return self.head(jnp.asarray(self.recurrent(sequence))[:, -1])
