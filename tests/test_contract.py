"""Optax's contract: beside every optimizer and inside every wrapper."""

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from common import NORMS, compilations
from jax import lax

from optax_unitscale import clip_norm, gradient_norms, keep_norm, orthogonalize, unit_scale

SCOPES: dict[str, dict[str, Any]] = {
    "leaf": {},
    "global": {"scope": "global"},
    "labels": {"scope": {"vector": "a", "matrix": "a", "pair": "b"}},
    "axis": {"axis": -1},
}
BASES = {
    "alone": optax.scale(-0.01),
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(optax.exponential_decay(0.1, 100, 1e-3), momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
}
START = {
    "vector": jnp.array([-1.0, 10.0, 1.0]),
    "matrix": jnp.zeros((2, 2)),
    "pair": jnp.zeros(2),
}
# A norm and a scope that is not the default, for the wrappers that any will do for.
OPTIONS: dict[str, Any] = {"norm": "rms", **SCOPES["labels"]}
each_scope = pytest.mark.parametrize("scope", SCOPES)


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    # Adam, MultiSteps and others of Optax mix floats with integers.
    with jax.numpy_dtype_promotion("standard"):
        yield


def gradient(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), START)


GRADIENTS = [gradient(seed) for seed in range(2)]


def with_momentum() -> optax.GradientTransformation:
    """What is wrapped: its state tells whether an update was lost."""
    return optax.chain(unit_scale(**OPTIONS), optax.sgd(0.1, momentum=0.9))


def apply(optimizer: Any, gradients: Any = GRADIENTS) -> Any:
    """The updates for some gradients, and the last state."""
    update, state, updates = jax.jit(optimizer.update), optimizer.init(START), []
    for each in gradients:
        result, state = update(each, state, START)
        updates.append(result)
    return updates, state


def check(tree: Any, expected: Any) -> None:
    """Equal but for a few roundings: what is compiled together is rounded together."""
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, expected)
    chex.assert_trees_all_close(tree, expected, rtol=1e-6, atol=1e-6)


@each_scope
@pytest.mark.parametrize("base", BASES)
def test_updates_and_state_keep_their_types_under_cond(base, scope, x64):
    dtypes = [jnp.bfloat16, jnp.float64, jnp.float16]
    params = {k: START[k].astype(dtype) for k, dtype in zip(START, dtypes, strict=True)}
    norm = dict(zip(SCOPES, NORMS, strict=True))[scope]
    optimizer = optax.chain(unit_scale(norm, **SCOPES[scope]), BASES[base])

    def step(params, state, keep):
        return lax.cond(
            keep,
            lambda: optimizer.update(params, state, params, unexpected=1),
            lambda: (params, state),
        )

    state = jax.eval_shape(optimizer.init, params)
    updates, new_state = jax.eval_shape(step, params, state, True)
    for before, after in [(params, updates), (state, new_state)]:
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


MASK = {"vector": True, "matrix": False, "pair": True}
LABELS = {"vector": "scaled", "matrix": "plain", "pair": "scaled"}
PARTIAL: dict[str, Callable[[Any], Any]] = {
    "masked": lambda scaler: optax.masked(scaler, MASK),
    "masked twice": lambda scaler: optax.masked(optax.masked(scaler, MASK), lambda _: MASK),
    "partition": lambda scaler: optax.partition(
        {"scaled": scaler, "plain": optax.identity()}, lambda _: LABELS
    ),
}


@each_scope
def test_what_a_wrapper_leaves_out_is_neither_scaled_nor_counted(scope):
    scaler, (given, _) = unit_scale(**SCOPES[scope]), GRADIENTS
    left_out = given | {"matrix": optax.MaskedNode()}
    updates: Any = scaler.update(left_out, scaler.init(left_out))[0]
    expected = updates | {"matrix": given["matrix"]}
    for wrap in PARTIAL.values():
        wrapped = wrap(scaler)
        check(wrapped.update(given, wrapped.init(START))[0], expected)


def test_leaving_everything_out_changes_nothing():
    masked = optax.masked(unit_scale(), dict.fromkeys(START, False))
    assert masked.update(START, masked.init(START))[0] == START
    partition = optax.partition(
        {"x": unit_scale(), "y": optax.identity()}, dict.fromkeys(START, "y")
    )
    assert partition.update(START, partition.init(START))[0] == START


def test_multi_steps_waits_with_zeros_and_then_scales_the_mean():
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *GRADIENTS)
    (waiting, update), _ = apply(optax.MultiSteps(with_momentum(), 2))
    check(waiting, jax.tree.map(jnp.zeros_like, START))
    check(update, apply(with_momentum(), [mean])[0][0])


def test_inject_hyperparams_schedules_min_norm_and_leaves_the_rest():
    make = optax.inject_hyperparams(unit_scale, static_args=("axis",))
    schedule = optax.piecewise_constant_schedule(4.0, {1: 16.0})
    updates, state = apply(make(min_norm=schedule, **OPTIONS))
    assert set(state.hyperparams) == {"min_norm"}
    for update, each, floor in zip(updates, GRADIENTS, (4.0, 64.0), strict=True):
        check(update, apply(unit_scale(min_norm=floor, **OPTIONS), [each])[0][0])


def test_an_injected_min_norm_changed_by_hand_is_obeyed_and_compiles_nothing():
    optimizer = optax.inject_hyperparams(unit_scale)("linf", min_norm=8.0)
    update, params = jax.jit(optimizer.update), jnp.full(3, 2.0)
    state = optimizer.init(params)
    _, state = update(params, state, params)
    state.hyperparams["min_norm"] = jnp.float32(16)
    before = compilations()
    updates, _ = update(params, state, params)
    assert compilations() == before
    np.testing.assert_array_equal(np.asarray(updates), np.float32(0.125))


@pytest.mark.parametrize("place", ["behind", "around"])
def test_apply_if_finite_refuses_what_was_not_finite_before(place):
    def guard(inner):
        return optax.apply_if_finite(inner, max_consecutive_errors=5)

    behind = optax.chain(unit_scale(**OPTIONS), guard(optax.sgd(0.1, momentum=0.9)))
    optimizer = behind if place == "behind" else guard(with_momentum())
    bad = [{**GRADIENTS[0], "vector": jnp.array([1.0, x, 0.0])} for x in (np.nan, np.inf)]
    updates, state = apply(optimizer, [GRADIENTS[0], *bad, GRADIENTS[1]])
    check(updates[1:3], [jax.tree.map(jnp.zeros_like, START)] * 2)
    # The momentum, too, is as if nothing had happened.
    check([updates[0], updates[3]], apply(with_momentum())[0])
    assert int(optax.tree.get(state, "total_notfinite")) == 2


def test_schedule_free_moves_its_fast_iterate_by_the_updates():
    optimizer = optax.contrib.schedule_free(with_momentum(), learning_rate=0.1)
    updates, _ = apply(with_momentum())
    expected = jax.tree.map(lambda p, u, v: p + u + v, START, *updates)
    check(optax.tree.get(apply(optimizer)[1], "z"), expected)


def test_lookahead_meets_halfway_after_its_period():
    optimizer = optax.lookahead(with_momentum(), sync_period=2, slow_step_size=0.5)
    (first, second), _ = apply(with_momentum())
    params: Any = optax.LookaheadParams.init_synced(START)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for each in GRADIENTS:
        updates, state = update(each, state, params)
        params = optax.apply_updates(params, updates)
    halfway = jax.tree.map(lambda p, u, v: p + 0.5 * (u + v), START, first, second)
    check(params, optax.LookaheadParams(fast=halfway, slow=halfway))


def test_flatten_makes_the_tree_one_group_and_leaves_labels_nothing_to_name():
    check(apply(optax.flatten(unit_scale()))[0], apply(unit_scale(scope="global"))[0])
    with pytest.raises(ValueError, match=r"entry for updates, .* \['matrix', 'pair', 'vector'\]"):
        apply(optax.flatten(unit_scale(**SCOPES["labels"])))


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="needs optax 0.2.7")
def test_a_monitor_sees_the_norms_before_and_ones_after():
    def measure(updates):
        return gradient_norms(updates, **OPTIONS)

    smooth = optax.measure_with_ema(measure, decay=0.5)
    optimizer = optax.chain(
        optax.monitor({"before": measure, "smooth": smooth}),
        unit_scale(**OPTIONS),
        optax.monitor({"after": measure}),
    )
    updates, state = apply(optimizer)
    check(updates, apply(unit_scale(**OPTIONS))[0])
    first, norms = map(measure, GRADIENTS)
    check(optax.tree.get(state, "before"), norms)
    average = jax.tree.map(lambda x, y: (x / 4 + y / 2) / 0.75, first, norms)
    check(optax.tree.get(state, "smooth"), average)
    check(optax.tree.get(state, "after"), jax.tree.map(jnp.ones_like, norms))


@pytest.mark.parametrize("make", [unit_scale, lambda: clip_norm(0.1), orthogonalize, keep_norm])
def test_debug_nans_finds_none_where_there_are_none_though_nothing_is_jitted(make):
    params = {"kernel": jnp.eye(2)}
    state = make().init(params)
    with jax.debug_nans(True), jax.disable_jit():
        updates, _ = make().update(params, state, params)
    assert np.isfinite(updates["kernel"]).all()
