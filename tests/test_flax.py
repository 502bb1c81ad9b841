"""The transformation beside the libraries that hold parameters: Flax, Orbax, and others' trees."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from flax.training.train_state import TrainState
from jax.sharding import AxisType

from optax_unitscale import gradient_norms, layers_of, unit_muon, unit_scale

RATE = 0.125
LAYERS = 3
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)


def slices(path: str, x: jax.Array) -> tuple[int, ...] | None:
    """Every layer of a stack has a norm of its own."""
    return tuple(range(1, x.ndim)) if path.startswith("blocks/") else None


def per_layer() -> optax.GradientTransformation:
    return optax.chain(unit_scale(axis=slices), optax.sgd(RATE))


def watched(optimizer: Any = None) -> optax.GradientTransformation:
    snapshot = optax.snapshot("grad_norms", gradient_norms)
    return optax.chain(snapshot, unit_scale(), optimizer or optax.sgd(RATE))


def check_moved(before: Any, after: Any, **options: Any) -> dict[str, jax.Array]:
    """Every group of parameters has moved by the learning rate."""
    moved = gradient_norms(jax.tree.map(jnp.subtract, after, before), **options)
    for distance in moved.values():
        # The rounding of parameters around 1, over a distance of an eighth.
        np.testing.assert_allclose(np.asarray(distance), RATE, rtol=16 * 2.0**-23)
    return moved


class Stack(nn.Module):
    """Layers whose parameters are stacked along axis 0, and a head."""

    @nn.compact
    def __call__(self, x):
        """One number for each row."""
        scan = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = scan(nn.Dense(4, name="blocks"), x, None)
        return nn.Dense(1, name="head")(x)


def linen_state(model: nn.Module, tx: optax.GradientTransformation) -> tuple[TrainState, Any]:
    """A state, and the gradient of a loss there."""
    params = model.init(jax.random.key(0), INPUTS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss(params):
        return jnp.sum(state.apply_fn({"params": params}, INPUTS) ** 2)

    return state, jax.grad(loss)(params)


def test_linens_train_state_moves_each_parameter_by_the_rate_and_logs_its_norm():
    state, gradient = linen_state(Stack(), watched())
    after = jax.jit(lambda state, gradient: state.apply_gradients(grads=gradient))(state, gradient)
    names = set(check_moved(state.params, after.params))
    assert names == set(traverse_util.flatten_dict(state.params, sep="/"))
    norms = optax.tree.get(after.opt_state, "grad_norms")
    np.testing.assert_allclose(
        np.asarray(norms["head/kernel"]), np.linalg.norm(gradient["head"]["kernel"]), rtol=1e-6
    )


def test_linens_boxes_of_partitioned_parameters_stay_and_leave_no_trace_in_the_names():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", None))
    state, gradient = linen_state(nn.Dense(4, kernel_init=init), watched())
    after = state.apply_gradients(grads=gradient).params
    assert set(check_moved(state.params, after)) == {"bias", "kernel"}
    assert isinstance(after["kernel"], nn.Partitioned)
    assert jax.tree.structure(after) == jax.tree.structure(state.params)


def test_each_layer_of_linens_scan_moves_by_the_rate_however_weak_its_gradient():
    state, gradient = linen_state(Stack(), per_layer())
    weak = jnp.array([1e-6, 1.0, 1e6])
    gradient["blocks"] = jax.tree.map(
        lambda g: g * weak.reshape(-1, *[1] * (g.ndim - 1)), gradient["blocks"]
    )
    after = state.apply_gradients(grads=gradient)
    moved = check_moved(state.params, after.params, axis=slices)
    assert moved["blocks/kernel"].shape == (LAYERS,)
    assert moved["head/kernel"].shape == ()


class Head(nnx.Param):
    """Parameters that an optimizer can select by their type."""


class NNXStack(nnx.Module):
    """Layers whose parameters are stacked along axis 0, a head, and a value that is not trained."""

    def __init__(self, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        self.head = Head(jnp.full((4, 1), 0.5))
        self.scale = nnx.Variable(jnp.ones(()))

    def __call__(self, x):
        """One number for each row."""
        scan = nnx.scan(
            lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return scan(x, self.blocks) @ self.head[...] * self.scale[...]


@nnx.jit(static_argnames="wrt")
def nnx_step(model: nnx.Module, optimizer: nnx.Optimizer, wrt: Any = nnx.Param) -> None:
    gradient = nnx.grad(lambda m: jnp.sum(m(INPUTS) ** 2), argnums=nnx.DiffState(0, wrt))(model)
    optimizer.update(model, gradient)


def arrays(model: nnx.Module, kind: Any = nnx.Param) -> Any:
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, kind)))


def test_each_layer_of_nnxs_scan_moves_by_the_rate():
    model = NNXStack(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, per_layer(), wrt=nnx.Param)
    before = arrays(model)
    nnx_step(model, optimizer)
    moved = check_moved(before, arrays(model), axis=slices)
    assert {name: norm.shape for name, norm in moved.items()} == {
        "blocks/bias": (LAYERS,),
        "blocks/kernel": (LAYERS,),
        "head": (),
    }


def test_nnxs_optimizer_moves_what_wrt_selects_and_nothing_else():
    model = NNXStack(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, watched(), wrt=Head)
    head, rest = arrays(model, Head), arrays(model, nnx.Not(Head))
    nnx_step(model, optimizer, Head)
    assert set(check_moved(head, arrays(model, Head))) == {"head"}
    assert set(optax.tree.get(optimizer.opt_state, "grad_norms")) == {"head"}
    jax.tree.map(np.testing.assert_array_equal, arrays(model, nnx.Not(Head)), rest)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_nnxs_partitioned_parameters_keep_their_sharding(kind):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "data"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(4, 4, kernel_init=init, rngs=nnx.Rngs(0))
        # The moments of Adam take on the parameters' sharding; the logged norms must not.
        optimizer = nnx.Optimizer(model, watched(optax.adam(RATE)), wrt=nnx.Param)
        before, sharding = arrays(model), model.kernel[...].sharding
        # Adam raises a float to an integer power.
        with jax.numpy_dtype_promotion("standard"):
            nnx_step(model, optimizer)
    assert set(optax.tree.get(optimizer.opt_state, "grad_norms")) == {"bias", "kernel"}
    assert model.kernel[...].sharding.is_equivalent_to(sharding, 2)
    # Adam's first step is one of signs.
    distance = np.abs(np.asarray(arrays(model)["kernel"]) - np.asarray(before["kernel"]))
    np.testing.assert_allclose(distance, RATE, rtol=1e-4)


def haiku_gradient() -> Any:
    """Modules by name, each a dict of its own parameters, as `haiku.transform` gives them."""
    shapes = {"mlp/~/linear_0": (4, 8), "mlp/~/linear_1": (8, 2)}
    rng = np.random.default_rng(0)
    return {
        module: {
            "w": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "b": jnp.asarray(rng.normal(size=shape[1:]), jnp.float32),
        }
        for module, shape in shapes.items()
    }


def test_haikus_module_names_stand_in_the_names_of_the_norms():
    names = {f"mlp/~/linear_{i}/{leaf}" for i in range(2) for leaf in "wb"}
    gradient = haiku_gradient()
    assert set(gradient_norms(gradient)) == names
    seen = set()
    gradient_norms(gradient, axis=lambda path, x: seen.add(path))
    assert seen == names


def test_haikus_modules_can_be_the_groups():
    def by_module(updates):
        return {module: module for module in updates}

    gradient = haiku_gradient()
    updates: Any = unit_scale(scope=by_module).update(gradient, optax.EmptyState())[0]
    norms = gradient_norms(updates, scope=by_module)
    assert set(norms) == {"mlp/~/linear_0", "mlp/~/linear_1"}
    for module, leaves in updates.items():
        together = np.concatenate([np.ravel(leaf) for leaf in leaves.values()])
        np.testing.assert_allclose(np.linalg.norm(together), 1, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(norms[module]), 1, rtol=1e-6)


def test_equinox_modules_move_by_the_rate_and_stay_what_they_are():
    # The function in Lambda is a leaf and no array; a Linear without a bias holds None.
    model: Any = eqx.nn.Sequential(
        [
            eqx.nn.Linear(4, 3, key=jax.random.key(0)),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Linear(3, 1, use_bias=False, key=jax.random.key(1)),
        ]
    )
    optimizer = watched()

    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.sum(jax.vmap(model)(INPUTS) ** 2)

    @eqx.filter_jit
    def step(model, state):
        value, gradient = loss(model)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    arrays = functools.partial(eqx.filter, filter_spec=eqx.is_array)
    after, state, before = step(model, optimizer.init(arrays(model)))
    names = {"layers/0/weight", "layers/0/bias", "layers/2/weight"}
    moved = check_moved(arrays(model), arrays(after))
    assert set(moved) == set(optax.tree.get(state, "grad_norms")) == names
    assert jax.tree.structure(after) == jax.tree.structure(model)
    assert loss(after)[0] < before


def test_orbax_gives_back_every_bit_of_the_state(tmp_path):
    optimizer = watched(optax.adam(RATE))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), haiku_gradient()) | {"f32": INPUTS}
    update = jax.jit(optimizer.update)
    with jax.numpy_dtype_promotion("standard"):
        _, state = update(params, optimizer.init(params))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            target = optimizer.init(params)
            restored = checkpointer.restore(tmp_path / "state", target)
        pairs = [(state, restored), (update(params, state), update(params, restored))]
    for before, after in pairs:
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert x.dtype == y.dtype
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_an_nnx_module_as_a_tree_moves_as_its_state_does():
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    state = nnx.state(model, nnx.Param)
    for layers in (None, layers_of(model)):
        tx: Any = unit_muon(0.1, layers=layers)
        updates = [tx.update(tree, tx.init(tree))[0] for tree in (model, state)]
        for x, y in zip(*map(jax.tree.leaves, updates), strict=True):
            np.testing.assert_array_equal(x, y)
