"""`keep_norm`: parameters keep the norm that they had at the start, each group by itself."""

import collections
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint as ocp
import pytest
from common import NORMS, compilations, sample
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import COLLECTIVE, check_layout, draw, make_mesh, shard, shard_map

from optax_unitscale.layers import Kernel
from optax_unitscale.parameters import keep_norm

LAYERS = {"dense/kernel": Kernel(0, 1), "experts": Kernel(1, 2), "gates": Kernel(0, 1, blocks=3)}
SHAPES = {
    "dense/kernel": (160, 120),
    "dense/bias": (120,),
    "embedding": (16, 8),
    "experts": (8, 16, 24),
    "gates": (8, 48),
}
KEPT = ("dense/kernel", "experts", "gates")
PARAMS = {name: draw(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
STEPS = {name: 0.1 * draw(shape, 10 + seed) for seed, (name, shape) in enumerate(SHAPES.items())}
EPS = 2.0**-23


def stepped(params: Any, steps: Any, start: Any = None, **options: Any) -> Any:
    """The parameters after one step, and the update."""
    optimizer = keep_norm(**options)
    updates, _ = optimizer.update(steps, optimizer.init(start or params), params)
    return optax.apply_updates(params, updates), updates


def groups(name: str, x: Any) -> list[np.ndarray]:
    """Each expert and each gate by itself."""
    x = np.asarray(x, np.float64)
    return list(x) if name == "experts" else np.split(x, 3, 1) if name == "gates" else [x]


@pytest.mark.parametrize("norm", NORMS)
def test_each_group_keeps_its_norm_and_moves_in_the_direction_of_the_sum(norm):
    compiled = []
    for size in (1e-30, 1.0, 1e30):
        params, steps = ({k: x * np.float32(size) for k, x in t.items()} for t in (PARAMS, STEPS))
        after, updates = stepped(params, steps, norm=norm, layers=LAYERS)
        for name in KEPT:
            parts = (groups(name, tree[name]) for tree in (params, steps, after))
            for p, d, q in zip(*parts, strict=True):
                radius = oracle.norm_of([p], norm)
                error = float(oracle.norm_of([q], norm) / radius) - 1
                assert abs(error) <= 4 * EPS
                target = np.asarray(oracle.unit([p + d], norm)[0] * radius, np.float64)
                np.testing.assert_allclose(q, target, rtol=0, atol=8 * EPS * np.abs(p).max())
        for name in ("dense/bias", "embedding"):
            assert updates[name] is steps[name]
        compiled.append(compilations())
    assert compiled[0] == compiled[-1]


def test_float64_keeps_its_precision_beside_float32(x64):
    params: Any = {
        "a": {"kernel": jnp.asarray(sample((8, 8), "float64"))},
        "b": {"kernel": jnp.ones((8, 8), jnp.float32)},
    }
    after, updates = stepped(params, jax.tree.map(lambda x: 0.1 * x[::-1], params))
    before, now = (np.linalg.norm(np.asarray(t["a"]["kernel"])) for t in (params, after))
    np.testing.assert_allclose(now, before, rtol=4 * 2.0**-52)
    assert [x.dtype for x in jax.tree.leaves(updates)] == [np.float64, np.float32]


def walk(is_naive: bool) -> np.ndarray:
    """The norms along 10 000 steps in bfloat16, over the first; naively, R is measured again."""
    start = {"kernel": jnp.asarray(0.02 * draw((16, 16)), jnp.bfloat16)}
    optimizer = keep_norm()

    def length(params):
        return jnp.linalg.norm(params["kernel"].astype(jnp.float32))

    def rounded(x):  # Else XLA may compute on in float32.
        return lax.reduce_precision(x, 8, 7)

    def step(carry, key):
        params, state, momentum = carry
        momentum = 0.95 * momentum + jax.random.normal(key, momentum.shape)
        step = 1e-3 * length(params) * momentum / jnp.linalg.norm(momentum)
        state = optimizer.init(params) if is_naive else state
        updates, state = optimizer.update({"kernel": step.astype(jnp.bfloat16)}, state, params)
        params = jax.tree.map(rounded, optax.apply_updates(params, jax.tree.map(rounded, updates)))
        return (params, state, momentum), length(params)

    keys = jax.random.split(jax.random.key(0), 10_000)
    carry = start, optimizer.init(start), jnp.zeros((16, 16))
    return np.asarray(jax.jit(lambda: lax.scan(step, carry, keys))()[1] / length(start))


def test_bfloat16_does_not_drift_over_10_000_steps_as_it_does_if_the_norm_is_measured_again():
    assert np.abs(walk(is_naive=False) - 1).max() < 2.0**-9
    assert np.abs(walk(is_naive=True)[-1] - 1) > 2.0**-7


def test_groups_of_zeros_pass_through_and_nan_stays_in_its_group():
    params: Any = {"experts": PARAMS["experts"].copy()}
    params["experts"][2] = 0
    steps: Any = {"experts": STEPS["experts"].copy()}
    steps["experts"][4:6, 1, 1] = np.nan, np.inf
    steps["experts"][6] = 0
    _, updates = stepped(params, steps, layers={"experts": Kernel(1, 2)})
    update = np.asarray(updates["experts"])
    np.testing.assert_array_equal(update[2], steps["experts"][2])
    np.testing.assert_array_equal(update[6], 0)
    assert np.isnan(update[4:6]).all()
    assert np.isfinite(np.delete(update, [4, 5], 0)).all()


def test_a_norm_that_float32_does_not_hold_gives_nan_and_no_zeros():
    params = {"kernel": np.full((4, 4), 3e38, np.float32), "other/kernel": np.eye(2)}
    after, _ = stepped(params, {"kernel": -0.1 * params["kernel"], "other/kernel": np.ones((2, 2))})
    assert np.isnan(after["kernel"]).all()
    assert abs(np.linalg.norm(after["other/kernel"]) - 2**0.5) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_multi_steps_inside_or_outside_changes_nothing_between_its_steps(dtype):
    params = {"kernel": jnp.asarray(draw((16, 16)), dtype)}
    other = {"kernel": params["kernel"] + jnp.asarray(0.01, dtype)}  # Off the radius.
    for optimizer in (
        optax.MultiSteps(keep_norm(), 2),
        optax.chain(optax.MultiSteps(optax.identity(), 2).gradient_transformation(), keep_norm()),
    ):
        with jax.numpy_dtype_promotion("standard"):
            update, state, moves = jax.jit(optimizer.update), optimizer.init(params), []
            for _ in range(2):
                updates, state = update(other, state, other)
                moves.append(np.abs(np.asarray(updates["kernel"], np.float32)).max())
        assert moves[0] == 0
        assert moves[1] > 0


def test_steps_in_float16_of_parameters_in_bfloat16_keep_norm():
    params = {"kernel": jnp.ones((4, 3), jnp.bfloat16)}
    tx: Any = keep_norm()
    step, _ = tx.update({"kernel": jnp.full((4, 3), 0.5, jnp.float16)}, tx.init(params), params)
    assert step["kernel"].dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(step["kernel"], float), 0, atol=1e-3)


def test_a_radius_is_kept_from_zero_on_and_follows_an_injected_schedule():
    params: Any = {"kernel": jnp.zeros((4, 6))}
    schedule = optax.piecewise_constant_schedule(3.0, {1: 2.0})
    optimizer = optax.inject_hyperparams(keep_norm)("rms", layers={}, radius=schedule)
    with jax.numpy_dtype_promotion("standard"):  # The schedule mixes floats with integers.
        update, state = jax.jit(optimizer.update), optimizer.init(params)
    for expected in (3, 6):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update({"kernel": draw((4, 6))}, state, params)
        params = optax.apply_updates(params, updates)
        size = np.sqrt(np.mean(np.square(np.asarray(params["kernel"], np.float64))))
        np.testing.assert_allclose(size, expected, rtol=4 * EPS)
    assert set(state.hyperparams) == {"radius"}


@pytest.mark.parametrize("axis", [0, {"dense": 0, "embed": None}, lambda path, x: 0])
def test_an_axis_stands_in_for_that_of_the_layers_and_others_still_pass_through(axis):
    params = {"dense": {"kernel": draw((8, 6)), "bias": draw((6,))}, "embed": draw((3,))}
    steps = jax.tree.map(lambda x: 0.3 * x[::-1], params)
    after, updates = stepped(params, steps, axis=axis)
    columns = [np.linalg.norm(np.asarray(t["dense"]["kernel"]), axis=0) for t in (params, after)]
    np.testing.assert_allclose(*columns, rtol=1e-6)
    assert updates["embed"] is steps["embed"]


def test_masked_kernels_and_those_without_update_keep_nothing():
    optimizer: Any = optax.masked(keep_norm(), {"a": True, "b": False, "c": True})
    params = {name: {"kernel": draw((4, 4), seed)} for seed, name in enumerate("abc")}
    steps: Any = {"a": None, "b": params["b"], "c": params["a"]}
    updates, _ = optimizer.update(steps, optimizer.init(params), params)
    _, alone = stepped({"c": params["c"]}, {"c": params["a"]})
    assert updates["a"] is None
    assert updates["b"] is params["b"]
    np.testing.assert_allclose(updates["c"]["kernel"], alone["c"]["kernel"], atol=4 * EPS)


class Model(nnx.Module):
    """A kernel with axes for a mesh."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("a", "b"))
        self.dense = nnx.Linear(8, 4, kernel_init=init, rngs=rngs)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nnxs_partitioned_parameters_keep_norm_and_sharding(kind):
    with jax.set_mesh(make_mesh(kind)):
        model = Model(nnx.Rngs(0))
        before = model.dense.kernel[...]
        optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), keep_norm()), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            gradient = nnx.grad(lambda model: jnp.sum(model.dense(jnp.ones((2, 8))) ** 2))(model)
            optimizer.update(model, gradient)

        step(model, optimizer)
        step(model, optimizer)
        after = model.dense.kernel[...]
    assert after.sharding.is_equivalent_to(before.sharding, 2)
    assert not np.array_equal(after, before)
    norms = [np.linalg.norm(np.asarray(x, np.float64)) for x in (before, after)]
    np.testing.assert_allclose(*norms, rtol=4 * EPS)


def test_the_radii_survive_a_checkpoint_and_map_params(tmp_path):
    optimizer: Any = optax.chain(optax.trace(0.9), keep_norm(axis=0))
    params = {"kernel": draw((4, 6)), "bias": draw((6,))}
    state = optimizer.init(params)
    moved: Any = optax.tree.map_params(optimizer, jnp.zeros_like, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    for each in (moved, restored):
        assert jax.tree.structure(each) == jax.tree.structure(state)
        np.testing.assert_array_equal(each[1].radii, state[1].radii)
    np.testing.assert_allclose(state[1].radii, np.linalg.norm(params["kernel"], axis=0), rtol=1e-6)


def test_the_radii_fit_parameters_that_were_restored_in_another_order():
    params = {f"block_{i}": {"kernel": (i + 1) * jnp.eye(3)} for i in range(12)}
    restored = collections.OrderedDict(reversed(params.items()))
    tx = keep_norm()
    still = jax.tree.map(jnp.zeros_like, restored)
    steps, _ = tx.update(still, tx.init(params), restored)
    for step in jax.tree.leaves(steps):
        np.testing.assert_allclose(step, 0, atol=1e-6)


def specs(experts: P, gates: P, kernel: P) -> dict[str, P]:
    parts = {"experts": experts, "gates": gates, "dense/kernel": kernel}
    return {name: parts.get(name, P()) for name in SHAPES}


OPTIMIZER = keep_norm(layers=LAYERS)
EXPECTED, _ = stepped(PARAMS, STEPS, layers=LAYERS)


def check_near(after: Any) -> None:
    """Equal but for the order of sums and a few roundings of numbers near 1."""
    for name, x in after.items():
        np.testing.assert_allclose(x, EXPECTED[name], rtol=8 * EPS, atol=2 * EPS)


def both(optimizer: Any, params: Any, steps: Any) -> tuple[Any, Any]:
    """The parameters after a step, and the state."""
    updates, state = optimizer.update(steps, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_keep_their_norms_and_layout_and_no_kernel_is_sent(kind):
    # No device has a whole gate, and some have parts of two.
    split = specs(P("a", None, "b"), P(None, ("a", "b")), P("a", "b"))
    with jax.set_mesh(mesh := make_mesh(kind)):
        params, steps = shard(PARAMS, mesh, split), shard(STEPS, mesh, split)
        step = jax.jit(lambda *trees: both(OPTIMIZER, *trees)).lower(params, steps).compile()
        result, _ = step(params, steps)
    check_layout(result, params)
    check_near(result)
    # At most the norms of the gates' 48 columns, padded; the smallest kernel has 384 elements.
    sent = re.findall(r"\[([\d,]*)\]", str(COLLECTIVE.findall(str(step.as_text()))))
    assert sent
    assert max(math.prod(int(n) for n in sizes.split(",") if n) for sizes in sent) <= 64


def test_a_mesh_axis_of_one_device_splits_nothing():
    kinds = {"axis_types": (AxisType.Explicit,) * 2, "devices": jax.devices("cpu")[:8]}
    with jax.set_mesh(mesh := jax.make_mesh((1, 8), ("a", "b"), **kinds)):
        split = specs(P("a", None, "b"), P(None, "b"), P("b"))
        trees = [shard(tree, mesh, split) for tree in (PARAMS, STEPS)]
        result, _ = jax.jit(lambda *trees: both(OPTIMIZER, *trees))(*trees)
    check_near(result)


def test_in_shard_map_norms_run_over_shards_and_not_over_replicas():
    split = specs(P(None, "a", "b"), P(), P("b"))
    step = shard_map(lambda *trees: both(OPTIMIZER, *trees), (split, split), (split, P()))
    check_near(step(PARAMS, STEPS)[0])


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_experts_that_are_split_have_radii_where_they_are(check_vma):
    split = specs(P("a", None, "b"), P(), P("b", "a"))
    names = {"experts": "b", "dense/kernel": ("a", "b"), "gates": ()}
    optimizer = keep_norm(layers=LAYERS, axis_name=lambda path, x: names[path])
    state = shard_map(optimizer.init, (split,), P("a"), check_vma=check_vma)(PARAMS)
    update = shard_map(
        optimizer.update, (split, P("a"), split), (split, P("a")), check_vma=check_vma
    )
    check_near(optax.apply_updates(PARAMS, update(STEPS, state, PARAMS)[0]))


def test_what_cannot_be_kept_is_refused():
    optimizer = keep_norm()
    params = {"kernel": draw((4, 4))}
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"params is None.*update\(updates, state, params\)"):
        optimizer.update(params, state)
    with pytest.raises(ValueError, match=r"has 1 radii, expected 0.*init\(params\)"):
        optimizer.update({"bias": draw((4,))}, state, {"bias": draw((4,))})
    with pytest.raises(ValueError, match=r"updates have \['a/kernel'\], and params have no such"):
        optimizer.update({"a": params}, state, params)
    for wrong in (params["kernel"][:1], jnp.ones((4, 4), int)):
        with pytest.raises(ValueError, match=r"got \['kernel .* for \(4, 4\) float32'\]"):
            optimizer.update({"kernel": wrong}, state, params)
    with pytest.raises(ValueError, match="keep_norm: radius is -1"):
        keep_norm(radius=-1.0)
    split = specs(P(), P("a"), P())
    with pytest.raises(ValueError, match=r"gates of shape \(2, 48\) is split over \('a',\)"):
        shard_map(OPTIMIZER.init, (split,), P())(PARAMS)


def test_axes_may_be_a_tree_like_parameters_that_hold_none_or_integers():
    params = {"kernel": draw((4, 6)), "n": None, "count": jnp.arange(3)}
    state: Any = keep_norm(axis={"kernel": 0, "n": None, "count": None}).init(params)
    assert state.radii.shape == (6,)


def test_parameters_with_reduced_axes_keep_norm_and_type():
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        spec = P(None, "b", reduced=frozenset("a"))
        params = {"kernel": jax.device_put(jnp.asarray(draw((8, 4))), spec)}
        tx = keep_norm()
        update = jax.jit(lambda p: tx.update(jax.tree.map(lambda x: 0.1 * x, p), tx.init(p), p)[0])
        result = update(params)["kernel"]
    assert result.sharding == params["kernel"].sharding
    np.testing.assert_allclose(result, 0, atol=1e-6)
