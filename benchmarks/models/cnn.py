"""A small convolutional classifier of single-channel images."""

import functools

import jax
from flax import nnx

__all__ = ["CNN"]


class CNN(nnx.Module):
    """Two convolutions, each halved by a maximum, and two linear layers."""

    def __init__(self, size: int, classes: int, rngs: nnx.Rngs):
        halve = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
        self.features = nnx.Sequential(
            nnx.Conv(1, 16, (3, 3), rngs=rngs),
            nnx.relu,
            halve,
            nnx.Conv(16, 32, (3, 3), rngs=rngs),
            nnx.relu,
            halve,
        )
        self.hidden = nnx.Linear(32 * (size // 4) ** 2, 64, rngs=rngs)
        self.head = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape (batch, size, size) to logits of shape (batch, classes)."""
        x = self.features(images[..., None])
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))
