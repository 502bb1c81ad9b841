"""What the leaves of a group are: precision, number of elements, mesh axes, real parts."""

import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_unitscale import mesh
from optax_unitscale.groups import Group, Member

__all__ = [
    "accumulator",
    "complex_of",
    "count",
    "crosses_devices",
    "is_small",
    "opaque",
    "real_parts",
    "renumbered",
    "root",
    "with_mesh_axes",
]


# Elements. From here on XLA:CPU adds most of float32 up with a library; below, one element after
# the other within blocks of 32 along every axis.
SMALL = 4096


def is_small(x: jax.Array, times: int = 1) -> bool:
    """Whether a leaf's sum needs care on CPU; not known of a size that jax.export leaves open."""
    return isinstance(x.size, int) and x.size < times * SMALL


def accumulator(group: Group, leaves: Sequence[jax.Array]) -> np.dtype:
    """The dtype that a group's sum is taken in."""
    dtypes = {jnp.finfo(leaves[member.leaf].dtype).dtype for member in group.members}
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def renumbered(group: Group, leaves: Sequence[jax.Array]) -> tuple[tuple[Group], list[jax.Array]]:
    """The same group among its own leaves only: equal for groups that are alike."""
    members = tuple(member._replace(leaf=i) for i, member in enumerate(group.members))
    return (Group("", members),), [leaves[member.leaf] for member in group.members]


def crosses_devices(group: Group, leaves: Sequence[jax.Array]) -> bool:
    """Whether a group's sum runs over mesh axes."""
    return any(mesh.axes_of(leaves[member.leaf], member.mesh_axes) for member in group.members)


def with_mesh_axes(
    group: Group, values: Sequence[jax.Array]
) -> list[tuple[jax.Array, tuple[Hashable, ...]]]:
    """One value a member, each with the mesh axes over which it is still split."""
    pairs = zip(values, group.members, strict=True)
    return [(value, mesh.axes_of(value, member.mesh_axes)) for value, member in pairs]


def count(group: Group, leaves: Sequence[jax.Array]) -> int:
    """The number of elements that share each norm of the group, on all devices."""
    return sum(_elements(leaves[member.leaf], member) for member in group.members)


def root(norm: str, group: Group, leaves: Sequence[jax.Array]) -> float:
    """The ratio of what `norms.group_norms` measures to the norm: √n for the rms of n elements."""
    if norm != "rms":
        return 1.0
    elements = count(group, leaves)
    if not isinstance(elements, int):
        raise ValueError(
            f"optax_unitscale: norm 'rms' needs the number of elements that share a norm, which is "
            f"{elements} where jax.export leaves shapes open. Export them whole, or use norm 'l2'."
        )
    return math.sqrt(elements)


def real_parts(x: jax.Array, dtype: np.dtype) -> list[jax.Array]:
    """The array, or its real and imaginary parts, in another dtype."""
    parts = [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    return [lax.convert_element_type(part, dtype) for part in parts]


def opaque(x: jax.Array) -> jax.Array:
    """Hides from XLA that a leaf is c * y: it would multiply c with what the leaf is multiplied by.

    Or square c and y, each by itself. That can leave the range where the leaf does not. Rounding to
    more bits than there are costs nothing, and XLA does not look through it. XLA:TPU, which makes
    float64 of float32, cannot round it.
    """
    info = jnp.finfo(x.dtype)

    def rounded(x: jax.Array) -> jax.Array:
        return lax.reduce_precision(x, info.nexp + 1, info.nmant + 1)

    if info.bits < 64:
        return rounded(x)
    return lax.platform_dependent(x, tpu=lambda x: x, default=rounded)


def complex_of(parts: Sequence[jax.Array]) -> jax.Array:
    """Undoes `real_parts`."""
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _elements(x: jax.Array, member: Member) -> int:
    here = math.prod(x.shape[axis] for axis in member.axes)
    return here * mesh.total_size(mesh.axes_of(x, member.mesh_axes))
