"""Across devices `orthogonalize` gives the numbers of one device and keeps layouts."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import EMPTY
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import draw, make_mesh, shard, shard_map

from optax_unitscale import orthogonalize


def orthogonal(tree: Any) -> Any:
    return orthogonalize().update(tree, EMPTY)[0]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_kernels_give_the_numbers_of_one_device_and_keep_their_layout(kind):
    tree = {f"w{i}": {"kernel": draw((16, 24), seed=i)} for i in range(9)}
    specs = {f"w{i}": {"kernel": P("a") if i % 2 else P(None, ("a", "b"))} for i in range(9)}
    with jax.set_mesh(mesh := make_mesh(kind)):
        inputs = shard(tree, mesh, specs)
        update = jax.jit(orthogonal).lower(inputs).compile()
        result = update(inputs)
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(inputs), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, 2)
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(orthogonal(tree)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    # Nine matrices on eight devices: two for each, and not nine.
    stacks = [int(n) for n in re.findall(r"f32\[(\d+),16,24\]", str(update.as_text()))]
    assert 2 in stacks


def test_a_kernel_that_shard_map_splits_is_refused():
    update = shard_map(orthogonal, (P("a"),), P("a"))
    with pytest.raises(ValueError, match=r"orthogonalize: updates\['kernel'\] .* jax\.shard_map"):
        update({"kernel": jnp.ones((8, 4))})
