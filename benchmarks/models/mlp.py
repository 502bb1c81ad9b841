"""A multilayer perceptron."""

import itertools
from collections.abc import Callable

import jax
from flax import nnx

__all__ = ["MLP"]


class MLP(nnx.Module):
    """Hidden linear layers of equal width, each under an activation, and a linear head."""

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        outputs: int,
        activation: Callable[[jax.Array], jax.Array],
        rngs: nnx.Rngs,
    ):
        widths = itertools.pairwise([inputs, *[width] * depth])
        layers = [[nnx.Linear(*pair, rngs=rngs), activation] for pair in widths]
        self.hidden = nnx.Sequential(*itertools.chain(*layers))
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape (batch, height, width) to logits of shape (batch, outputs)."""
        return self.head(self.hidden(images.reshape(len(images), -1)))
