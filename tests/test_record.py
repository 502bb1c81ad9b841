"""The norms that `record_norms` keeps are those of the last gradient, in any wrapper."""

import inspect
import pickle
import re
import textwrap
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import compilations
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

from optax_unitscale import (
    gradient_norms,
    record_norms,
    recorded_norms,
    step_ratios,
    unit_scale,
)

PARAMS = {"a": jnp.full((2, 2), 100.0), "b": jnp.ones(9)}
# A gradient of ones has norms of 2 and 3.
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def times(tree: Any, factor: Any) -> Any:
    return jax.tree.map(lambda x: x * factor, tree)


def floats(norms: dict[str, jax.Array]) -> dict[str, Any]:
    assert all(type(norm) is type(jnp.zeros(())) for norm in norms.values())
    return {name: np.asarray(norm).tolist() for name, norm in norms.items()}


NAN, LAST = {"a": np.nan, "b": np.nan}, {"a": 8.0, "b": 12.0}
OPTIMIZER = optax.chain(record_norms(), unit_scale(), optax.sgd(0.1))
WRAPPED = {
    "plain": (OPTIMIZER, [2, 3, 4], [{"a": 2.0 * n, "b": 3.0 * n} for n in (2, 3, 4)]),
    "MultiSteps": (optax.MultiSteps(OPTIMIZER, 3), [3, 4, 5, 9], [NAN, NAN, LAST, LAST]),
    "apply_if_finite": (
        optax.apply_if_finite(OPTIMIZER, 9),
        [np.inf, 4, np.nan],
        [NAN, LAST, LAST],
    ),
}


def test_under_debug_nans_init_needs_an_exception_and_steps_none():
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match="nan"):
            record_norms().init(PARAMS)
        with jax.debug_nans(False):
            state = OPTIMIZER.init(PARAMS)
        _, state = jax.jit(OPTIMIZER.update)(ONES, state, PARAMS)
        assert floats(recorded_norms(state, PARAMS)) == {"a": 2, "b": 3}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_norms_are_nan_until_a_gradient_comes_through_and_then_its_own(wrapper):
    optimizer, factors, expected = WRAPPED[wrapper]
    state = optimizer.init(PARAMS)
    np.testing.assert_equal(floats(recorded_norms(state, PARAMS)), NAN)

    @jax.jit
    def step(state, factor):
        # optax.MultiSteps divides by integers.
        with jax.numpy_dtype_promotion("standard"):
            _, state = optimizer.update(times(ONES, factor), state, PARAMS)
        return state, recorded_norms(state, PARAMS)

    for factor, norms in zip(factors, expected, strict=True):
        state, within = step(state, factor)
        np.testing.assert_equal(floats(within), norms)
        np.testing.assert_equal(floats(recorded_norms(state, PARAMS)), norms)


def test_a_scan_keeps_its_carry_and_stacked_states_give_a_history():
    optimizer = optax.chain(record_norms(axis=0), unit_scale())

    def step(state, factor):
        updates, state = optimizer.update(times(ONES, factor), state)
        return state, (jax.tree.leaves(updates)[0], state)

    _, (updates, states) = jax.lax.scan(step, optimizer.init(PARAMS), jnp.array([1.0, 0.0, 4e25]))
    norms = recorded_norms(states, PARAMS, axis=0)
    expected = {"a": np.sqrt(2) * np.array([[1, 1], [0, 0], [4e25, 4e25]]), "b": [3, 0, 1.2e26]}
    for name, values in expected.items():
        np.testing.assert_allclose(norms[name], values, rtol=4 * 2.0**-23)
    np.testing.assert_allclose(updates[:, 0, 0], [0.5, 0, 0.5], rtol=4 * 2.0**-23)


def test_leaves_without_a_gradient_have_no_norm():
    params = {"count": jnp.arange(3), "frozen": jnp.ones(4), "w": jnp.ones((2, 2))}
    recorder = record_norms()
    state = recorder.init(params)
    updates = {"count": np.zeros(3, jax.dtypes.float0), "frozen": None, "w": params["w"]}
    result, state = recorder.update(updates, state, params)
    assert result is updates
    expected = {"frozen": np.nan, "w": 2.0}
    np.testing.assert_equal(floats(recorded_norms(state, params)), expected)
    with pytest.raises(ValueError, match="record_norms: the updates have 1 norms, expected the 2 "):
        recorder.update(updates, state)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "layer"},
        {"scope": {"a": 1, "b": 1}},
        {"axis": {"a": {"kernel": 0, "bias": ()}, "b": 0}},
    ],
    ids=["layer", "labels", "axis"],
)
def test_groups_have_the_names_and_norms_of_gradient_norms(options):
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (3, 4), "bias": (4,)}, "b": {"kernel": (4, 2)}}
    gradient = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    recorder = record_norms(**options)
    _, state = recorder.update(gradient, recorder.init(gradient))
    norms = recorded_norms(state, gradient, **options)
    np.testing.assert_equal(floats(norms), floats(gradient_norms(gradient, **options)))
    mapped = optax.tree.map_params(recorder, lambda x: x, state)
    np.testing.assert_equal(floats(recorded_norms(mapped, gradient, **options)), floats(norms))


def test_a_state_comes_back_from_a_checkpoint(tmp_path):
    optimizer = optax.chain(record_norms(), optax.sgd(0.1, momentum=0.9))
    _, state = optimizer.update(ONES, optimizer.init(PARAMS), PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", optimizer.init(PARAMS))
    for back in (restored, pickle.loads(pickle.dumps(state))):
        assert floats(recorded_norms(back, PARAMS)) == {"a": 2.0, "b": 3.0}


def test_axes_of_a_mesh_may_split_what_is_kept_where_they_are_explicit():
    axis = {"a": 1, "b": None}
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)):
        split = PartitionSpec("x", reduced=frozenset({"y"}))
        params = {"a": jax.device_put(jnp.ones((8, 4)), split), "b": jnp.ones(9)}
        recorder = record_norms(axis=axis)

        def step(state, factor):
            _, state = recorder.update(times(params, factor), state)
            return state, state

        _, states = jax.lax.scan(step, recorder.init(params), jnp.arange(2.0))
        norms = recorded_norms(states, params, axis=axis)
        ratios = step_ratios(params, params, axis=axis)
    assert floats(norms) == {"a": [[0.0] * 8, [2.0] * 8], "b": [0.0, 3.0]}
    assert {name: np.unique(ratio) for name, ratio in ratios.items()} == {"a": 1, "b": 1}


def test_init_may_be_outside_of_the_shard_map_that_the_axis_name_belongs_to():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    recorder = record_norms(axis_name=lambda name, x: "x" if name == "a" else ())
    params = {"a": jnp.ones((16, 4)), "b": jnp.ones(9)}
    split = {"a": PartitionSpec("x"), "b": PartitionSpec()}
    specs = (split, PartitionSpec())
    step = jax.shard_map(
        recorder.update, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
    )
    _, state = jax.jit(step)(params, recorder.init(params))
    assert floats(recorded_norms(state, params)) == {"a": 8.0, "b": 3.0}


class Partitioned(nnx.Module):
    """A layer whose kernel is split over a mesh."""

    def __init__(self, rngs: nnx.Rngs):
        split = nnx.with_partitioning(nnx.initializers.ones, (None, "x"))
        self.layer = nnx.Linear(4, 8, kernel_init=split, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """A linear map."""
        return self.layer(x)


def test_nnx_gives_plain_arrays_also_where_parameters_are_partitioned(tmp_path):
    def loss_of(model):
        return model(jnp.ones((1, 4))).sum()

    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))):
        model = Partitioned(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
        optimizer.update(model, nnx.grad(loss_of)(model))
        norms = recorded_norms(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert set(floats(norms)) == {"layer/bias", "layer/kernel"}
    for name, squares in {"layer/bias": 8, "layer/kernel": 32}.items():
        np.testing.assert_allclose(norms[name], np.sqrt(squares), rtol=4 * 2.0**-23)

    # The lines of the docstring write what TensorBoard reads and Weights & Biases takes.
    blocks = re.findall(r"::\n\n((?: +.*\n)+)", inspect.getdoc(recorded_norms) or "")
    logged = {}
    wandb = types.SimpleNamespace(log=lambda norms, step: logged.update(norms))
    with SummaryWriter(str(tmp_path)) as writer:
        params = nnx.state(model, nnx.Param)
        known = {"params": params, "opt_state": optimizer.opt_state, "step": 7}
        for block in blocks:
            lines = textwrap.dedent(block)
            exec(
                lines, {**known, "recorded_norms": recorded_norms, "writer": writer, "wandb": wandb}
            )
    assert len(blocks) == 2
    assert {type(norm) for norm in logged.values()} == {float}
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(logged) == {f"grad_norms/{name}" for name in norms}
    for name in logged:
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (7, logged[name])


def test_neither_callables_made_anew_nor_a_name_for_each_leaf_compile_again():
    params = {f"{i}": jnp.ones(3) for i in range(50)}

    def step():
        recorder = record_norms(axis=lambda path, x: None)
        _, state = recorder.update(params, recorder.init(params))
        return recorded_norms(state, params, axis=lambda path, x: None)

    before = compilations()
    step()
    # The state at first, the norms, and one slice for all names.
    assert compilations() - before <= 3
    before = compilations()
    step()
    assert compilations() == before


STATE = record_norms().init(PARAMS)


@pytest.mark.parametrize(
    ("state", "params", "message"),
    [
        (optax.sgd(0.1).init(PARAMS), PARAMS, "holds no state of record_norms, expected one. Put "),
        (
            (STATE, {"x": STATE}),
            PARAMS,
            r"several .* \['opt_state\[0\]', .*such as opt_state\[0\]\.",
        ),
        (STATE, ONES["a"], r"holds 2 norms, expected 1 of \['updates'\]\. Pass the scope and axis"),
        (
            optax.masked(record_norms(), {"a": True, "b": False}).init(PARAMS),
            PARAMS,
            "put it before",
        ),
    ],
    ids=["none", "several", "params", "masked"],
)
def test_norms_that_cannot_be_named_are_refused(state, params, message):
    with pytest.raises(ValueError, match=f"^recorded_norms: .*{message}"):
        recorded_norms(state, params)


def test_two_groups_of_one_name_are_refused_at_init():
    with pytest.raises(ValueError, match=r"record_norms: several groups are named \['1'\]"):
        record_norms(scope={"a": 1, "b": "1"}).init(PARAMS)


def test_names_do_not_depend_on_which_leaves_have_a_gradient():
    params = {name: jnp.ones(1) for name in "abc"}
    labels = {"a": "x", "b": "y", "c": "x"}
    tx = record_norms(scope=labels)
    gradient = {"a": None, "b": jnp.full(1, 2.0), "c": jnp.full(1, 3.0)}
    for given in ((), (params,)):
        _, state = tx.update(gradient, tx.init(params), *given)
        norms = recorded_norms(state, params, scope=labels)
        assert {name: float(norm) for name, norm in norms.items()} == {"x": 3, "y": 2}


def test_shapes_are_enough_for_init_and_names():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    abstract = jax.eval_shape(lambda: params)
    state = record_norms().init(abstract)
    _, state = record_norms().update(params, state)
    assert recorded_norms(state, abstract).keys() == {"a", "b"}


def test_a_model_with_functions_for_leaves_is_recorded_as_it_is():
    model: Any = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    grads = eqx.filter_grad(lambda model: model(jnp.ones(3)).sum())(model)
    tx = record_norms()
    _, state = tx.update(grads, tx.init(model))
    norms = recorded_norms(state, model)
    assert {name: float(norm) for name, norm in norms.items()} == pytest.approx(
        {name: float(norm) for name, norm in gradient_norms(grads).items()}
    )
