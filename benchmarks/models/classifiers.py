"""Small classifiers of single-channel images, (batch, height, width), to logits."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


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
        """Reads each image as a vector."""
        return self.head(self.hidden(images.reshape(len(images), -1)))


class CNN(nnx.Module):
    """Two convolutions, each halved by a maximum, and two linear layers."""

    def __init__(self, size: int, classes: int, rngs: nnx.Rngs):
        halve = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
        first, second = nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.features = nnx.Sequential(first, nnx.relu, halve, second, nnx.relu, halve)
        self.hidden = nnx.Linear(32 * (size // 4) ** 2, 64, rngs=rngs)
        self.head = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reads square images of the size."""
        x = self.features(images[..., None])
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class RNN(nnx.Module):
    """A recurrent layer of hyperbolic tangents that reads an image, and a linear head.

    Gradients explode where `gain`, the spectral norm of the initial recurrent weights, is large.
    """

    def __init__(self, inputs: int, width: int, gain: float, outputs: int, rngs: nnx.Rngs):
        self.inputs = inputs
        orthogonal = nnx.initializers.orthogonal(gain)
        cell = nnx.SimpleCell(inputs, width, recurrent_kernel_init=orthogonal, rngs=rngs)
        self.recurrent = nnx.RNN(cell, rngs=rngs)
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reads `inputs` pixels a step."""
        sequence = images.reshape(len(images), -1, self.inputs)
        return self.head(jnp.asarray(self.recurrent(sequence))[:, -1])
