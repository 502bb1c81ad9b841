"""Optax's contract: every norm and scope beside every optimizer and inside every wrapper."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from common import NORMS, compilations
from jax import lax

from optax_unitscale import gradient_norms, unit_scale

SCOPES: dict[str, dict[str, Any]] = {
    "leaf": {},
    "global": {"scope": "global"},
    "labels": {"scope": {"vector": "a", "matrix": "a", "pair": "b"}},
    "axis": {"axis": -1},
}
STEPS = 15_000
RATE = optax.exponential_decay(0.1, STEPS, 1e-3)
# Alone there is no schedule: min_norm makes a constant rate converge.
FLOOR = {"alone": 10.0}
BASES = {
    "alone": optax.scale(-0.01),
    "sgd": optax.sgd(RATE),
    "momentum": optax.sgd(RATE, momentum=0.9),
    "adam": optax.adam(RATE),
    "adamw": optax.adamw(RATE),
    "lion": optax.lion(RATE),
}
START = {
    "vector": jnp.array([-1.0, 10.0, 1.0]),
    "matrix": jnp.zeros((2, 2)),
    "pair": jnp.zeros(2),
}
END = {
    "vector": jnp.array([1.0, -1.0, 1.0]),
    "matrix": jnp.array([[3.0, -2.0], [1.0, 4.0]]),
    "pair": jnp.ones(2),
}
# Each problem by what it optimises: a parabola, one of a matrix, Rosenbrock's valley, both shapes.
PROBLEMS = {"vector": [1, 0, 0], "matrix": [0, 1, 0], "pair": [0, 0, 1], "vector matrix": [1, 1, 0]}

# Where an optimizer is compiled for each: every norm and every scope once.
PAIRS = list(zip(NORMS, SCOPES, strict=True))
each_norm = pytest.mark.parametrize("norm", NORMS)
each_scope = pytest.mark.parametrize("scope", SCOPES)
each_pair = pytest.mark.parametrize(("norm", "scope"), PAIRS)
each_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    # Adam, MultiSteps and others of Optax mix floats with integers.
    with jax.numpy_dtype_promotion("standard"):
        yield


def objective(params: Any, weights: jax.Array) -> jax.Array:
    x, y = params["pair"]
    rosenbrock = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    parabolas = [jnp.sum((params[k] - END[k]) ** 2) for k in ("vector", "matrix")]
    return jnp.dot(weights, jnp.stack([*parabolas, rosenbrock]))


def gradient(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), START)


GRADIENTS = [gradient(seed) for seed in range(2)]


def with_momentum(norm: str, scope: str) -> optax.GradientTransformation:
    """What is wrapped: its state tells whether an update was lost."""
    return optax.chain(unit_scale(norm, **SCOPES[scope]), optax.sgd(0.1, momentum=0.9))


def apply(optimizer: Any, gradients: Any = GRADIENTS, jit: Any = lambda f: f) -> Any:
    """The updates for some gradients, and the last state."""
    update, state, updates = jit(optimizer.update), optimizer.init(START), []
    for each in gradients:
        result, state = update(each, state, START)
        updates.append(result)
    return updates, state


def check(tree: Any, expected: Any) -> None:
    """Equal but for a few roundings: what is compiled together is rounded together."""
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, expected)
    chex.assert_trees_all_close(tree, expected, rtol=1e-6, atol=1e-6)


@functools.cache
def compiled(norm: str, scope: str) -> Callable[..., Any]:
    """Steps with any of the optimizers, so that they share what takes long to compile."""

    @jax.jit
    def run(base, weights, params, states, floor, steps):
        def branch(index, optimizer):
            def update(gradient, states, params):
                updates, state = optimizer.update(gradient, states[index], params)
                return updates, (*states[:index], state, *states[index + 1 :])

            return update

        scaler = unit_scale(norm, min_norm=floor, **SCOPES[scope])
        branches = [branch(index, optimizer) for index, optimizer in enumerate(BASES.values())]

        def step(_, carry):
            params, states = carry
            gradient = jax.grad(objective)(params, weights)
            scaled, _ = scaler.update(gradient, optax.EmptyState(), params, unexpected=1)
            updates, states = lax.switch(base, branches, scaled, states, params)
            return optax.apply_updates(params, updates), states

        return lax.fori_loop(0, steps, step, (params, states))

    return run


@each_norm
@each_scope
@each_base
def test_every_combination_solves_every_problem_and_compiles_once(norm, scope, base):
    problems = {name: jnp.asarray(weights, jnp.float32) for name, weights in PROBLEMS.items()}
    run = functools.partial(compiled(norm, scope), list(BASES).index(base))
    states = tuple(optimizer.init(START) for optimizer in BASES.values())
    after_one = run(problems["vector"], START, states, 0.0, 1)
    before = compilations()
    run(problems["vector"], *after_one, 1e-3, 1)
    floor = FLOOR.get(base, 0.0)
    solved = {k: run(weights, START, states, floor, STEPS)[0] for k, weights in problems.items()}
    assert compilations() == before
    for name, params in solved.items():
        for k in name.split():
            np.testing.assert_allclose(np.asarray(params[k]), np.asarray(END[k]), atol=1e-2)


@each_norm
@each_scope
@each_base
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_updates_and_state_keep_their_types_under_cond(norm, scope, base, wide, request):
    if wide:
        request.getfixturevalue("x64")
    dtypes = [jnp.bfloat16, jnp.float64 if wide else jnp.float32, jnp.float16]
    params = {k: START[k].astype(dtype) for k, dtype in zip(START, dtypes, strict=True)}
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


@each_base
def test_map_params_reaches_the_moments_and_nothing_else(base):
    optimizer = optax.chain(unit_scale(), BASES[base])
    state = optimizer.init(START)
    moved = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(np.asarray(after - before), 1 if before.ndim else 0)


MASK = {"vector": True, "matrix": False, "pair": True}
LABELS = {"vector": "scaled", "matrix": "plain", "pair": "scaled"}
PARTIAL: dict[str, Callable[[Any], Any]] = {
    "masked": lambda scaler: optax.masked(scaler, MASK),
    "masked twice": lambda scaler: optax.masked(optax.masked(scaler, MASK), lambda _: MASK),
    "partition": lambda scaler: optax.partition(
        {"scaled": scaler, "plain": optax.identity()}, lambda _: LABELS
    ),
}


@each_pair
@pytest.mark.parametrize("wrapper", PARTIAL)
def test_what_a_wrapper_leaves_out_is_neither_scaled_nor_counted(norm, scope, wrapper):
    scaler = unit_scale(norm, **SCOPES[scope])
    expected, _ = apply(scaler, [{**each, "matrix": optax.MaskedNode()} for each in GRADIENTS])
    for update, each in zip(expected, GRADIENTS, strict=True):
        update["matrix"] = each["matrix"]
    check(apply(PARTIAL[wrapper](scaler))[0], expected)


@each_pair
def test_multi_steps_waits_with_zeros_and_then_scales_the_mean(norm, scope):
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *GRADIENTS)
    (waiting, update), _ = apply(optax.MultiSteps(with_momentum(norm, scope), 2), jit=jax.jit)
    check(waiting, jax.tree.map(jnp.zeros_like, START))
    check(update, apply(with_momentum(norm, scope), [mean])[0][0])


@each_pair
def test_inject_hyperparams_schedules_min_norm_and_leaves_the_rest(norm, scope):
    floors = [jnp.float32(4), jnp.float32(64)]
    make = optax.inject_hyperparams(unit_scale, static_args=("axis",))
    schedule = optax.piecewise_constant_schedule(4.0, {1: 16.0})
    updates, state = apply(make(norm, min_norm=schedule, **SCOPES[scope]))
    assert set(state.hyperparams) == {"min_norm"}
    for update, each, floor in zip(updates, GRADIENTS, floors, strict=True):
        check(update, apply(unit_scale(norm, min_norm=floor, **SCOPES[scope]), [each])[0][0])


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


def check_that_bad_gradients_are_refused(optimizer, norm, scope, jit):
    bad = [{**GRADIENTS[0], "vector": jnp.array([1.0, x, 0.0])} for x in (np.nan, np.inf)]
    updates, state = apply(optimizer, [GRADIENTS[0], *bad, GRADIENTS[1]], jit)
    check(updates[1:3], [jax.tree.map(jnp.zeros_like, START)] * 2)
    # The momentum, too, is as if nothing had happened.
    check([updates[0], updates[3]], apply(with_momentum(norm, scope))[0])
    assert int(optax.tree.get(state, "total_notfinite")) == 2


GUARDED = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), max_consecutive_errors=5)
GUARDED_UPDATE = jax.jit(GUARDED.update)


@each_pair
def test_apply_if_finite_behind_sees_what_was_not_finite_before(norm, scope):
    guarded = optax.GradientTransformation(GUARDED.init, GUARDED_UPDATE)
    optimizer = optax.chain(unit_scale(norm, **SCOPES[scope]), guarded)
    check_that_bad_gradients_are_refused(optimizer, norm, scope, jit=lambda f: f)


@each_pair
def test_apply_if_finite_around_refuses_a_bad_gradient(norm, scope):
    optimizer = optax.apply_if_finite(with_momentum(norm, scope), max_consecutive_errors=5)
    check_that_bad_gradients_are_refused(optimizer, norm, scope, jit=jax.jit)


@each_pair
def test_schedule_free_moves_its_fast_iterate_by_the_updates(norm, scope):
    optimizer = optax.contrib.schedule_free(with_momentum(norm, scope), learning_rate=0.1)
    updates, _ = apply(with_momentum(norm, scope))
    expected = jax.tree.map(lambda p, u, v: p + u + v, START, *updates)
    check(optax.tree.get(apply(optimizer)[1], "z"), expected)


@each_pair
def test_lookahead_meets_halfway_after_its_period(norm, scope):
    optimizer = optax.lookahead(with_momentum(norm, scope), sync_period=2, slow_step_size=0.5)
    (first, second), _ = apply(with_momentum(norm, scope))
    params: Any = optax.LookaheadParams.init_synced(START)
    state = optimizer.init(params)
    for each in GRADIENTS:
        updates, state = optimizer.update(each, state, params)
        params = optax.apply_updates(params, updates)
    halfway = jax.tree.map(lambda p, u, v: p + 0.5 * (u + v), START, first, second)
    check(params, optax.LookaheadParams(fast=halfway, slow=halfway))


@each_norm
@pytest.mark.parametrize("scope", ["leaf", "global", "axis"])
def test_flatten_makes_the_tree_one_group(norm, scope):
    flat = optax.flatten(unit_scale(norm, **SCOPES[scope]))
    check(apply(flat)[0], apply(unit_scale(norm, scope="global"))[0])


def test_flatten_leaves_labels_nothing_to_name():
    flat = optax.flatten(unit_scale(**SCOPES["labels"]))
    with pytest.raises(ValueError, match="scope has no label for updates, expected a pytree"):
        apply(flat)


@each_pair
@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="needs optax 0.2.7")
def test_a_monitor_sees_the_norms_before_and_ones_after(norm, scope):
    def measure(updates):
        return gradient_norms(updates, norm, **SCOPES[scope])

    smooth = optax.measure_with_ema(measure, decay=0.5)
    optimizer = optax.chain(
        optax.monitor({"before": measure, "smooth": smooth}),
        unit_scale(norm, **SCOPES[scope]),
        optax.monitor({"after": measure}),
    )
    updates, state = apply(optimizer)
    check(updates, apply(unit_scale(norm, **SCOPES[scope]))[0])
    norms = measure(GRADIENTS[-1])
    check(optax.tree.get(state, "before"), norms)
    first = measure(GRADIENTS[0])
    average = jax.tree.map(lambda x, y: (x / 4 + y / 2) / 0.75, first, norms)
    check(optax.tree.get(state, "smooth"), average)
    check(optax.tree.get(state, "after"), jax.tree.map(jnp.ones_like, norms))
