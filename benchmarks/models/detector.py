"""An anchor-free, single-class detector: where the centres of boxes are, and how large each is."""

import itertools

import jax
from flax import nnx

# Pixels of the image for each cell of the output, along either axis.
STRIDE = 8


class Block(nnx.Module):
    """A convolution, normalised and rectified, on a residual branch where shapes allow one."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, rngs: nnx.Rngs):
        self.residual = (inputs, stride) == (outputs, 1)
        more = {"strides": stride, "kernel_dilation": dilation, "use_bias": False}
        self.convolution = nnx.Conv(inputs, outputs, (3, 3), **more, rngs=rngs)
        # Over features alone, so that it does the same to a tile and to a whole photograph.
        self.norm = nnx.LayerNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps activations of shape (batch, row, column, feature)."""
        y = nnx.relu(self.norm(self.convolution(x)))
        return x + y if self.residual else y


class Detector(nnx.Module):
    """Three blocks that halve the image, three that look ever further around, and two heads."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        halving = itertools.pairwise((3, width // 4, width // 2, width))
        self.blocks = nnx.Sequential(
            *(Block(*widths, stride=2, dilation=1, rngs=rngs) for widths in halving),
            *(Block(width, width, stride=1, dilation=2**i, rngs=rngs) for i in range(3)),
        )
        # Begins where a centre is as rare as it is: in one cell of fifty.
        rare = nnx.initializers.constant(-4.0)
        self.centre = nnx.Conv(width, 1, (1, 1), bias_init=rare, rngs=rngs)
        self.box = nnx.Conv(width, 4, (1, 1), rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps colours from 0 to 1, of shape (batch, height, width, 3), to logits and boxes.

        The logits, of shape (batch, rows, columns), say how likely a box is centred in a cell. The
        boxes, of shape (batch, rows, columns, 4), say where that centre is from the cell's middle,
        in cells, and the logarithms of the width and the height in cells.
        """
        x = self.blocks(4 * images - 2)
        return self.centre(x)[..., 0], self.box(x)
