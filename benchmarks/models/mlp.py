"""A multilayer perceptron whose activations are sigmoids, which shrink gradients fourfold."""

import itertools

import jax
from flax import nnx

__all__ = ["SigmoidMLP"]


class SigmoidMLP(nnx.Module):
    """Hidden linear layers of equal width, each under a sigmoid, and a linear head."""

    def __init__(self, inputs: int, width: int, depth: int, outputs: int, rngs: nnx.Rngs):
        widths = itertools.pairwise([inputs, *[width] * depth])
        layers = [[nnx.Linear(*pair, rngs=rngs), nnx.sigmoid] for pair in widths]
        self.hidden = nnx.Sequential(*itertools.chain(*layers))
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape (batch, height, width) to logits of shape (batch, outputs)."""
        return self.head(self.hidden(images.reshape(len(images), -1)))
