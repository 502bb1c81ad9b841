"""What JAX's types say of a leaf that is spread over the devices of a mesh."""

from collections.abc import Hashable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_unitscale.paths import Path, show

__all__ = ["on_all", "partitions", "reduced_as", "varying_axes", "without_reduced"]


def varying_axes(x: jax.Array) -> tuple[Hashable, ...]:
    """The mesh axes that a leaf varies over, which JAX knows in `shard_map(check_vma=True)`."""
    aval = jax.typeof(x)
    varying = aval.mat.varying if hasattr(aval, "mat") else aval.vma  # Before JAX 0.10.
    return tuple(sorted(varying, key=str))


def partitions(caller: str, path: Path, x: jax.Array) -> tuple[Any, ...]:
    """The explicit mesh axes that each axis is split over; () if there is no mesh."""
    spec = _spec(x)
    if spec is None:
        return ()
    if spec.unreduced:
        raise ValueError(
            f"{caller}: {show(path)} is unreduced over {set(spec.unreduced)}: each device has a "
            "part of the sum. Use jax.sharding.reshard first."
        )
    split = _partitions(spec)
    return (*split, *[None] * (x.ndim - len(split)))


def on_all(x: jax.Array) -> jax.Array:
    """On all devices of an explicit mesh, for JAX concatenates nothing that its axes split."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def without_reduced(x: jax.Array) -> jax.Array:
    """The same leaf, of a type that can be combined with any other on its mesh.

    `reduced` axes concern the derivative only, and a leaf that has them cannot be combined with one
    that has none.
    """
    spec = _spec(x)
    if spec is None or not spec.reduced:
        return x
    plain = PartitionSpec(*_partitions(spec))
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, plain))


def reduced_as(like: jax.Array, x: jax.Array) -> jax.Array:
    """Undoes `without_reduced`."""
    spec = _spec(like)
    return jax.sharding.reshard(x, jax.typeof(like).sharding) if spec and spec.reduced else x


def _spec(x: jax.Array) -> Any:
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding.spec


def _partitions(spec: Any) -> tuple[Any, ...]:
    return tuple(getattr(spec, "partitions", spec))  # Before JAX 0.10 the spec is the tuple.
