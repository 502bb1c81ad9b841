"""The examples of the text on unit scaling, against what PyTorch and TensorFlow make of them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_unitscale import unit_scale

RECORDS = pathlib.Path(__file__).parent / "records"
NAMES = [f"{kind}{i}" for i in range(3) for kind in ("kernel", "bias")]
# In units of eps. Changing every initial parameter by one eps at random moves a loss or a parameter
# of these 200 steps by up to 8, so two correct programs may differ by that much. Measured: 3.
TOLERANCE = 16


def record(framework: str) -> dict[str, np.ndarray]:
    with np.load(RECORDS / f"{framework}.npz", allow_pickle=False) as file:
        return dict(file)


def loss_of(parameters, inputs, labels):
    x = inputs
    for i in range(3):
        x = x @ parameters[f"kernel{i}"] + parameters[f"bias{i}"][None]
        x = jnp.tanh(x) if i < 2 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def train(tx: optax.GradientTransformation, parameters, batches):
    """The loss before, and the parameters after, every step."""

    def step(carry, batch):
        parameters, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(parameters, *batch)
        updates, state = tx.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        return (parameters, state), (loss, parameters)

    return jax.lax.scan(step, (parameters, tx.init(parameters)), batches)[1]


def deviation(framework: str, scope: str, dtype, tx: optax.GradientTransformation) -> float:
    """Largest difference of a loss or a parameter, all of order 1, from the record, in eps."""
    arrays = record(framework)
    sgd = optax.sgd(float(arrays[f"{scope}_learning_rate"]))
    parameters = {name: jnp.asarray(arrays[name], dtype) for name in NAMES}
    batches = (jnp.asarray(arrays["inputs"], dtype), jnp.asarray(arrays["labels"], np.int32))
    losses, trajectory = train(optax.chain(tx, sgd), parameters, batches)
    steps = arrays["checkpoints"] - 1
    ours = {"losses": np.asarray(losses)}
    ours |= jax.tree.map(lambda x: np.asarray(x)[steps], trajectory)
    theirs = {name: arrays[f"{scope}_{np.dtype(dtype).name}_{name}"] for name in ours}
    assert theirs["losses"].shape == (200,)
    for name in ours:
        assert ours[name].dtype == dtype
        assert ours[name].shape == theirs[name].shape
    worst = max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
    return worst / float(np.finfo(dtype).eps)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_trajectory_of_200_steps_is_that_of_the_framework(framework, scope, dtype, request):
    if dtype == np.float64:
        request.getfixturevalue("x64")
    assert deviation(framework, scope, dtype, unit_scale(scope=scope)) < TOLERANCE


@pytest.mark.parametrize(("scope", "other"), [("leaf", "global"), ("global", "leaf")])
def test_trajectory_differs_without_unit_scale_and_with_the_other_scope(scope, other):
    for tx in (optax.identity(), unit_scale(scope=other)):
        assert deviation("torch", scope, np.float32, tx) > 1e4 * TOLERANCE


@pytest.mark.usefixtures("x64")
def test_trajectory_differs_with_an_epsilon_added_to_the_norm():
    def divide(updates, params):
        del params
        return jax.tree.map(lambda g: g / (jnp.linalg.norm(g) + 1e-6), updates)

    assert deviation("torch", "leaf", np.float64, optax.stateless(divide)) > 1e6 * TOLERANCE


def test_worked_example_steps_from_1_to_08_plain_and_09_unit_scaled():
    theta = jnp.float32(1.0)
    gradient = jax.grad(lambda t: t**2)(theta)
    after = []
    for tx in (optax.sgd(0.1), optax.chain(unit_scale(), optax.sgd(0.1))):
        updates, _ = tx.update(gradient, tx.init(theta))
        after.append(optax.apply_updates(theta, updates))
    np.testing.assert_allclose(np.array(after), [0.8, 0.9], rtol=float(np.finfo(np.float32).eps))


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_zero_gradient_gives_nan_in_the_pytorch_loop_and_zero_here(scope):
    assert np.isnan(record("torch")["zero_gradient"]).all()
    updates, _ = unit_scale(scope=scope).update(jnp.zeros(3), optax.EmptyState())
    np.testing.assert_array_equal(updates, np.zeros(3))
