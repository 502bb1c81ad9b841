"""Two processes with two devices each take the steps that one device takes."""

import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_unitscale import unit_muon, unit_scale

pytestmark = pytest.mark.slow


def losses(devices: Sequence[Any]) -> list[float]:
    """Of a small network whose parameters and batches are split over the devices."""
    mesh = jax.make_mesh((len(devices),), ("all",), axis_types=(AxisType.Auto,), devices=devices)
    split = NamedSharding(mesh, P("all"))
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        x = rng.normal(size=shape).astype(np.float32)
        return jax.make_array_from_callback(shape, split, x.__getitem__)

    params = {
        "up": {"kernel": draw(8, 16), "bias": draw(16)},
        "down": {"kernel": draw(16, 4), "bias": draw(4)},
    }
    optimizer = optax.chain(unit_scale(scope="global"), unit_muon(0.1))
    batch = draw(32, 8), draw(32, 4)

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
        found = hidden @ params["down"]["kernel"] + params["down"]["bias"][None]
        return jnp.mean((found - y) ** 2)

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, found = jax.jit(optimizer.init)(params), []
    for _ in range(10):
        params, state, value = step(params, state, batch)
        found.append(float(value))
    return found


def test_two_processes_give_the_losses_of_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    pair = [
        subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__)), where, str(index)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    expected = losses(jax.devices("cpu")[:1])
    assert expected[-1] < 0.8 * expected[0]
    for text in said:
        # Other lines say which library carries the sums between processes.
        (line,) = (line for line in text.splitlines() if line.startswith("losses "))
        found = [float(word) for word in line.split()[1:]]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    assert len(jax.devices()) == 4
    print("\nlosses", *losses(jax.devices()))
