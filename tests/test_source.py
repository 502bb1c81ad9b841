"""The examples of the text on unit scaling, against what PyTorch and TensorFlow make of them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_unitscale import unit_scale

RECORDS = pathlib.Path(__file__).parent / "source"
LEARNING_RATES = {"leaf": 0.02, "global": 0.05}


def record(framework: str) -> dict[str, np.ndarray]:
    with np.load(RECORDS / f"{framework}.npz", allow_pickle=False) as file:
        return dict(file)


def loss_of(parameters, inputs, labels):
    x = inputs
    for i, (kernel, bias) in enumerate(parameters):
        x = x @ kernel + bias[None]
        x = jnp.tanh(x) if i < 2 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def train(tx: optax.GradientTransformation, arrays, dtype):
    parameters = [
        (jnp.asarray(arrays[f"kernel{i}"], dtype), jnp.asarray(arrays[f"bias{i}"], dtype))
        for i in range(3)
    ]

    def step(carry, batch):
        parameters, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(parameters, *batch)
        updates, state = tx.update(gradients, state, parameters)
        return (optax.apply_updates(parameters, updates), state), loss

    batches = (jnp.asarray(arrays["inputs"], dtype), jnp.asarray(arrays["labels"], np.int32))
    (parameters, _), losses = jax.lax.scan(step, (parameters, tx.init(parameters)), batches)
    return np.asarray(losses), [np.asarray(x) for x in jax.tree.leaves(parameters)]


def deviation(framework: str, scope: str, dtype, tx) -> float:
    """Largest difference of a loss or of a final parameter, all of which are of order 1."""
    arrays = record(framework)
    key = f"{scope}_{np.dtype(dtype).name}"
    losses, final = train(tx, arrays, dtype)
    assert losses.shape == arrays[f"{key}_losses"].shape == (200,)
    pairs = [(losses, arrays[f"{key}_losses"])]
    pairs += [(ours, arrays[f"{key}_final{i}"]) for i, ours in enumerate(final)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_trajectory_of_200_steps_is_that_of_the_framework(framework, scope, dtype, request):
    if dtype == np.float64:
        request.getfixturevalue("x64")
    tx = optax.chain(unit_scale(scope=scope), optax.sgd(LEARNING_RATES[scope]))
    assert deviation(framework, scope, dtype, tx) < 16 * np.finfo(dtype).eps  # measured: 2


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_trajectory_differs_without_unit_scale(framework, scope):
    assert deviation(framework, scope, np.float32, optax.sgd(LEARNING_RATES[scope])) > 1e-2


def test_worked_example_steps_from_1_to_08_plain_and_09_unit_scaled():
    theta = jnp.float32(1.0)
    gradient = jax.grad(lambda t: t**2)(theta)
    after = []
    for tx in (optax.sgd(0.1), optax.chain(unit_scale(), optax.sgd(0.1))):
        updates, _ = tx.update(gradient, tx.init(theta))
        after.append(optax.apply_updates(theta, updates))
    np.testing.assert_allclose(np.array(after), [0.8, 0.9], rtol=float(np.finfo(np.float32).eps))


def test_zero_gradient_gives_nan_in_the_pytorch_loop_and_zero_here():
    assert np.isnan(record("torch")["zero_gradient"]).all()
    updates, _ = unit_scale().update(jnp.zeros(3), optax.EmptyState())
    assert (np.asarray(updates) == 0).all()
