"""The same on PyTorch, where it is installed: the loop over tensors, and its foreach form."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import machine
from benchmarks.timing.measurement import Timed

__all__ = ["INSTALLED", "steps", "transformations"]

INSTALLED = importlib.util.find_spec("torch") is not None
# What must be moved, whatever PyTorch moves.
_SCALE = ("read", "copy")
_STEP = ("read", "triad")


def transformations(shapes: Any) -> list[Timed]:
    """What to time of the scopes "leaf" and "global", on gradients of their own."""
    if not INSTALLED:
        return []
    torch, params = _params(shapes)

    def loop() -> None:
        for p in params:
            p.grad /= torch.norm(p.grad)

    def foreach() -> None:
        gradients = [p.grad for p in params]
        torch._foreach_div_(gradients, torch._foreach_norm(gradients))

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(params, 0.5)

    return [
        Timed("torch: p.grad /= norm(p.grad)", "leaf", _waiting(torch, loop), _SCALE),
        Timed("torch: foreach norm, div", "leaf", _waiting(torch, foreach), _SCALE),
        Timed("torch: clip_grad_norm_(0.5)", "global", _waiting(torch, clip), _SCALE),
    ]


def steps(shapes: Any) -> list[Timed]:
    """Whole optimizer steps, of scope "step"."""
    if not INSTALLED:
        return []
    torch, params = _params(shapes)
    sgd = torch.optim.SGD(params, lr=1e-3, foreach=True)

    def foreach() -> None:
        gradients = [p.grad for p in params]
        torch._foreach_div_(gradients, torch._foreach_norm(gradients))
        sgd.step()

    return [
        Timed("torch: SGD", "step", _waiting(torch, sgd.step), ("triad",)),
        Timed("torch: foreach norm, div, SGD", "step", _waiting(torch, foreach), _STEP),
    ]


def _params(shapes: Any) -> tuple[Any, list[Any]]:
    """PyTorch, and parameters with gradients of these shapes, with JAX's threads or on its GPU."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(machine.cores())
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for x in jax.tree.leaves(shapes):
        like = {"dtype": getattr(torch, x.dtype.name), "device": device}
        p = torch.zeros(x.shape, **like, requires_grad=True)
        p.grad = torch.empty(x.shape, **like).normal_(generator=generator)
        params.append(p)
    return torch, params


def _waiting(torch: Any, function: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call
