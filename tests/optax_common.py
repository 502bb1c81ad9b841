"""Optax's own common tests for contributed optimizers, run on `unit_sgd` and `unit_muon`.

    python tests/optax_common.py

The tests are those of the installed Optax. Their parameters have no names, so what each leaf is
follows from its rank here, as Optax's Muon has it.
"""

import functools
import importlib.util
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import optax
from absl.testing import absltest
from optax import contrib

from optax_unitscale import Kernel, unit_muon, unit_sgd
from optax_unitscale.paths import flatten

OURS = [
    {"opt_name": "unit_sgd", "opt_kwargs": {"learning_rate": 1e-3}},
    {"opt_name": "unit_sgd", "opt_kwargs": {"learning_rate": 1e-3, "weight_decay": 1e-3}},
    {"opt_name": "unit_muon", "opt_kwargs": {"learning_rate": 3e-3}},
    {"opt_name": "unit_muon", "opt_kwargs": {"learning_rate": 3e-3, "weight_decay": 1e-3}},
]


def by_rank(factory: Any) -> Any:
    """The same optimizer with layers that are known by their rank."""

    @functools.wraps(factory)
    def made(**options: Any) -> optax.GradientTransformationExtraArgs:
        def make(tree: Any) -> Any:
            ranks = {path.name: np.ndim(x) for path, x in flatten(tree)}
            layers = {n: Kernel(0, -1) if rank > 1 else "vector" for n, rank in ranks.items()}
            # Lists have no names by which a layer's leaves would share a norm.
            own = {"layers": layers} | ({"scope": "leaf"} if factory is unit_sgd else {})
            return factory(**(options | own))

        return optax.GradientTransformationExtraArgs(
            lambda params: make(params).init(params),
            lambda updates, state, params=None, **extra: make(updates).update(
                updates, state, params, **extra
            ),
        )

    return made


def load() -> Any:
    """Optax's module of tests with this list of optimizers in the place of its own."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    assert spec
    assert spec.origin
    text = pathlib.Path(spec.origin).read_text()
    for line, ours in (
        ("for optimizer in _MAIN_OPTIMIZERS_UNDER_TEST:\n", "_MAIN_OPTIMIZERS_UNDER_TEST = OURS\n"),
        ("# Adding here instantiations", "_MAIN_OPTIMIZERS_UNDER_TEST = OURS\n"),
        ("# TODO(harshm): make LARS", "_BASE_OPTIMIZERS = []\n"),
    ):
        assert text.count(line) == 1, line
        text = text.replace(line, ours + line)
    for factory in (unit_sgd, unit_muon):
        setattr(contrib, factory.__name__, by_rank(factory))
    module = importlib.util.module_from_spec(spec)
    module.__dict__["OURS"] = OURS
    sys.modules[spec.name] = module
    exec(compile(text, spec.origin, "exec"), module.__dict__)
    return module


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    absltest.main(module=load())
