"""Where a run's arrays live: on one device, or spread over a mesh of data and fsdp."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["AXES", "Layout", "make_mesh"]

# A batch is split over both; parameters and their optimizer state over the second.
AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """All devices of all processes as a mesh; an axis that `sizes` does not name has one.

    Raises:
      ValueError: the number of devices is another.
    """
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    wanted, found = math.prod(shape), jax.device_count()
    if wanted != found:
        named = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"{named} makes {wanted} devices, found {found} ({jax.default_backend()})")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to place arrays on a mesh; without one, all stay on JAX's default device.

    Attributes:
      mesh: from `make_mesh`, or None.
    """

    mesh: Mesh | None = None

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of what every device holds whole; None stands for JAX's choice."""
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    def shardings(self, tree: Any) -> Any:
        """Splits each array over fsdp along its largest axis that divides; None without a mesh."""
        mesh = self.mesh
        if mesh is None:
            return None
        return jax.tree.map(lambda x: NamedSharding(mesh, _spec(x, mesh.shape["fsdp"])), tree)

    def place(self, tree: Any) -> Any:
        """Puts a tree that is equal on all processes where `shardings` says."""
        return tree if self.mesh is None else jax.device_put(tree, self.shardings(tree))

    def rows(self, batch_size: int) -> slice | np.ndarray:
        """The rows of a batch that this process's devices hold, in ascending order."""
        if self.mesh is None:
            return slice(None)
        held = self._batches.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held if index]))

    def place_batch(self, rows: Any, batch_size: int) -> Any:
        """Makes the batch of all processes from each one's own `rows`."""
        if self.mesh is None:
            return rows
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                self._batches, x, (batch_size, *x.shape[1:])
            ),
            rows,
        )

    def collect(self, model: nnx.Module) -> nnx.Module:
        """A copy of a model on one device of this process, for what runs without a mesh."""
        if self.mesh is None:
            return model
        graph, state = nnx.split(model)
        whole = jax.device_put(state, self.replicated)
        return nnx.merge(graph, jax.tree.map(lambda x: x.addressable_data(0), whole))

    @property
    def _batches(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, P(AXES))


def _spec(x: Any, shards: int) -> P:
    dividing = [axis for axis, size in enumerate(x.shape) if size and size % shards == 0]
    if not dividing:
        return P()
    longest = max(dividing, key=lambda axis: x.shape[axis])
    return P(*(("fsdp" if axis == longest else None) for axis in range(x.ndim)))
