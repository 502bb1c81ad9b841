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

# A batch is split over both; parameters and their optimizer state over the second.
AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """All devices of all processes; a ValueError says where `sizes` make another number."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    wanted, found = math.prod(shape), jax.device_count()
    if wanted != found:
        named = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"{named} makes {wanted} devices, found {found} ({jax.default_backend()})")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to place arrays on a mesh; without one, all stay on JAX's default device."""

    mesh: Mesh | None = None

    def over(self, *axes: Any) -> NamedSharding | None:
        """The sharding along axes of the mesh; None, JAX's choice, without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(*axes))

    def shardings(self, tree: Any) -> Any:
        """Splits each array over fsdp along its largest axis that divides; None without a mesh."""
        if self.mesh is None:
            return None
        shards = self.mesh.shape["fsdp"]

        def of(x: Any) -> NamedSharding | None:
            sizes = [size if size and size % shards == 0 else 0 for size in x.shape]
            longest = sizes.index(max(sizes)) if any(sizes) else -1
            return self.over(*("fsdp" if axis == longest else None for axis in range(x.ndim)))

        return jax.tree.map(of, tree)

    def place(self, tree: Any) -> Any:
        """Puts a tree that is equal on all processes where `shardings` says."""
        if self.mesh is None:
            return tree
        # Not device_put, for which no NaN, as norms before the first gradient are, equals another.
        make = jax.make_array_from_callback
        return jax.tree.map(
            lambda x, split: make(x.shape, split, np.asarray(x).__getitem__),
            tree,
            self.shardings(tree),
        )

    def rows(self, batch_size: int) -> slice | np.ndarray:
        """The rows of a batch that this process's devices hold, in ascending order."""
        split = self.over(AXES)
        if split is None:
            return slice(None)
        held = split.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held if index]))

    def place_batch(self, rows: Any, batch_size: int) -> Any:
        """Makes the batch of all processes from each one's own `rows`."""
        split = self.over(AXES)
        if split is None:
            return rows
        make = jax.make_array_from_process_local_data
        return jax.tree.map(lambda x: make(split, x, (batch_size, *x.shape[1:])), rows)

    def collect(self, model: nnx.Module) -> nnx.Module:
        """A copy of a model on one device of this process, for what runs without a mesh."""
        if self.mesh is None:
            return model
        graph, state = nnx.split(model)
        whole = jax.device_put(state, self.over())
        return nnx.merge(graph, jax.tree.map(lambda x: x.addressable_data(0), whole))
