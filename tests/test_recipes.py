"""Published optimizers are chains of `unit_scale` and Optax's parts.

Each takes the steps of its paper, stated in NumPy's float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_unitscale import unit_scale

STEPS, RATE, BETA, TRUST = 20, 0.1, 0.9, 0.01
LABELS = {"first": "rest", "last": "last"}
SHAPES = {"first": {"kernel": (5, 4), "bias": (4,)}, "last": {"kernel": (4, 3), "bias": (3,)}}
# A step rounds each element, of order 1, a few times, and the gradient is no steeper than 3.
TOLERANCE = 32 * STEPS * 2.0**-52


def draw(seed, matrices_only):
    """A tree of normal samples."""
    rng = np.random.default_rng(seed)
    return {
        layer: {
            k: rng.normal(size=n) for k, n in leaves.items() if k == "kernel" or not matrices_only
        }
        for layer, leaves in SHAPES.items()
    }


def each(function, *trees):
    """A function of the leaves at each place."""
    return {
        layer: {k: function(*(tree[layer][k] for tree in trees)) for k in trees[0][layer]}
        for layer in trees[0]
    }


def together(tree):
    """The norm of all of a tree."""
    return np.sqrt(sum(np.sum(x**2) for leaves in tree.values() for x in leaves.values()))


def heavy_ball(normalize):
    """Normalised gradients, then momentum that starts at zero."""

    def step(memory, gradient, params, first):
        del params
        memory = each(np.zeros_like, gradient) if first else memory
        memory = each(lambda u, x: BETA * u + x, memory, normalize(gradient))
        return memory, each(lambda u: RATE * u, memory)

    return step


def normalized_sgd(memory, gradient, params, first):
    """Cutkosky and Mehta."""
    del params
    memory = gradient if first else each(lambda m, g: BETA * m + (1 - BETA) * g, memory, gradient)
    return memory, each(lambda m: RATE * m / together(memory), memory)


def sinkhorn_sgd(memory, gradient, params, first):
    """Scetbon et al.: Q and R as the diagonal matrices that they are there."""
    del params, first

    def alternate(x):
        m, n = x.shape
        for _ in range(5):
            q = np.diag(np.linalg.norm(x, axis=1))
            x = np.sqrt(n) * np.linalg.inv(q) @ x
            r = np.diag(np.linalg.norm(x, axis=0))
            x = np.sqrt(m) * x @ np.linalg.inv(r)
        return RATE * x

    return memory, each(alternate, gradient)


def column_normalized_sgd(memory, gradient, params, first):
    """Glentis et al."""
    del params
    momentum = np.zeros((4, 3)) if first else memory
    momentum = BETA * momentum + (1 - BETA) * gradient["last"]["kernel"]
    used = {"first": gradient["first"], "last": {"kernel": momentum}}
    columns = each(lambda x: np.stack([c / np.sqrt(c @ c) for c in x.T], axis=1), used)
    return momentum, each(lambda x: RATE * x, columns)


def lars(memory, gradient, params, first):
    """You et al., algorithm 1 without weight decay."""
    memory = each(np.zeros_like, gradient) if first else memory

    def velocity(v, w, g):
        local_rate = TRUST * np.sqrt(np.sum(w**2)) / np.sqrt(np.sum(g**2))
        return BETA * v + RATE * local_rate * g

    memory = each(velocity, memory, params, gradient)
    return memory, memory


def by_layer(gradient):
    """Each layer over the norm of its leaves together."""
    return {
        layer: {k: x / together({layer: leaves}) for k, x in leaves.items()}
        for layer, leaves in gradient.items()
    }


LARS = optax.chain(
    unit_scale(),
    optax.scale_by_trust_ratio(trust_coefficient=TRUST),
    optax.scale_by_learning_rate(RATE),
    optax.trace(BETA),
)


def in_full(count):
    """Optax's average starts at zero and would count the first gradient by 1 - momentum."""
    return jnp.where(count == 0, 1 / (1 - BETA), 1.0)


# The chain, its paper's step, and whether it is for matrices only.
CASES: dict[str, tuple[optax.GradientTransformation, Any, bool]] = {
    # Cutkosky, Mehta 2020, https://arxiv.org/abs/2002.03305.
    "normalized_sgd": (
        optax.chain(
            optax.scale_by_schedule(in_full),
            optax.ema(BETA, debias=False),
            unit_scale(scope="global"),
            optax.scale_by_learning_rate(RATE),
        ),
        normalized_sgd,
        False,
    ),
    # Zhao, Xie, Li 2020, https://arxiv.org/abs/2007.13985.
    "sngm": (
        optax.chain(unit_scale(scope="global"), optax.sgd(RATE, BETA)),
        heavy_ball(lambda g: each(lambda x: x / together(g), g)),
        False,
    ),
    # Yu et al. 2017, https://arxiv.org/abs/1707.04822.
    "block_normalized_sgd": (
        optax.chain(unit_scale(scope="layer"), optax.sgd(RATE, BETA)),
        heavy_ball(by_layer),
        False,
    ),
    # SinkGD: Scetbon, Ma, Gong, Meeds 2025, https://arxiv.org/abs/2502.06742.
    "sinkhorn_sgd": (
        optax.chain(
            *[unit_scale("rms", axis=1), unit_scale("rms", axis=0)] * 5,
            optax.scale_by_learning_rate(RATE),
        ),
        sinkhorn_sgd,
        True,
    ),
    # SCALE: Glentis, Li, Han, Hong 2025, https://arxiv.org/abs/2506.16659.
    "column_normalized_sgd": (
        optax.chain(
            optax.partition(
                {"last": optax.ema(BETA, debias=False), "rest": optax.identity()}, LABELS
            ),
            unit_scale(axis=0),
            optax.scale_by_learning_rate(RATE),
        ),
        column_normalized_sgd,
        True,
    ),
    # You, Gitman, Ginsburg 2017, https://arxiv.org/abs/1708.03888.
    "lars": (LARS, lars, False),
}
each_recipe = pytest.mark.parametrize("name", CASES)


@each_recipe
@pytest.mark.usefixtures("x64")
def test_twenty_steps_are_those_of_the_paper(name):
    optimizer, statement, matrices_only = CASES[name]
    start = draw(0, matrices_only)
    ours: Any = jax.tree.map(jnp.asarray, start)
    state, theirs, memory = optimizer.init(ours), start, None

    @jax.jit
    def step(params, state, noise):
        gradient = jax.tree.map(lambda x, a: jnp.sin(3 * x) + a, params, noise)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(STEPS):
        noise = draw(1 + index, matrices_only)
        ours, state = step(ours, state, noise)
        gradient = each(lambda x, a: np.sin(3 * x) + a, theirs, noise)
        memory, update = statement(memory, gradient, theirs, index == 0)
        theirs = each(np.subtract, theirs, update)
    worst = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), ours, theirs)
    assert max(jax.tree.leaves(worst)) < TOLERANCE
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), theirs, start)
    assert min(jax.tree.leaves(moved)) > 1e8 * TOLERANCE


@each_recipe
def test_a_recipe_takes_the_same_steps_where_gradients_vanish(name):
    optimizer, _, matrices_only = CASES[name]
    params = jax.tree.map(jnp.float32, draw(0, matrices_only))
    gradients = [jax.tree.map(jnp.float32, draw(1 + i, matrices_only)) for i in range(2)]
    results = []
    for magnitude in (1.0, 2.0**-100):
        state, updates = optimizer.init(params), None
        for gradient in gradients:
            gradient = jax.tree.map(lambda x, by=magnitude: x * by, gradient)
            updates, state = optimizer.update(gradient, state, params)
        results.append(updates)
    one, other = map(jax.tree.leaves, results)
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=16 * 2.0**-23)


def test_optaxs_own_lars_stands_still_there():
    params, gradient = jnp.ones(3), jnp.full(3, 1e-30)
    ours, theirs = LARS, optax.lars(RATE, momentum=BETA)
    moved = [tx.update(gradient, tx.init(params), params)[0] for tx in (ours, theirs)]
    np.testing.assert_allclose(np.asarray(moved[0]), -RATE * TRUST, rtol=1e-6)
    assert np.abs(np.asarray(moved[1])).max() < 1e-30
