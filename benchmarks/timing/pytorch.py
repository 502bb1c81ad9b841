"""The same on PyTorch, where it is installed: the loop over tensors, and its foreach form."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import machine
from benchmarks.timing.measurement import Timed

INSTALLED = importlib.util.find_spec("torch") is not None


def contenders(shapes: Any, *, steps: bool) -> list[Timed]:
    """What to time on gradients of these shapes: whole steps of an optimizer, or their scaling.

    Their passes are what must be moved, whatever PyTorch moves.
    """
    if not INSTALLED:
        return []
    torch = importlib.import_module("torch")
    params = _params(torch, shapes)
    sgd = torch.optim.SGD(params, lr=1e-3, foreach=True)

    def loop() -> None:
        for p in params:
            p.grad /= torch.norm(p.grad)

    def foreach() -> None:
        gradients = [p.grad for p in params]
        torch._foreach_div_(gradients, torch._foreach_norm(gradients))

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(params, 0.5)

    def foreach_step() -> None:
        foreach()
        sgd.step()

    def timed(name: str, scope: str, function: Callable[[], Any], *passes: str) -> Timed:
        def call() -> None:
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return Timed(f"torch: {name}", scope, call, passes)

    if steps:
        return [
            timed("SGD", "step", sgd.step, "triad"),
            timed("foreach norm, div, SGD", "step", foreach_step, "read", "triad"),
        ]
    return [
        timed("p.grad /= norm(p.grad)", "leaf", loop, "read", "copy"),
        timed("foreach norm, div", "leaf", foreach, "read", "copy"),
        timed("clip_grad_norm_(0.5)", "global", clip, "read", "copy"),
    ]


def _params(torch: Any, shapes: Any) -> list[Any]:
    """Parameters with gradients of these shapes, with JAX's threads or on its GPU."""
    torch.set_num_threads(machine.cores())
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for x in jax.tree.leaves(shapes):
        like = {"dtype": getattr(torch, x.dtype.name), "device": device}
        p = torch.zeros(x.shape, **like, requires_grad=True)
        p.grad = torch.empty(x.shape, **like).normal_(generator=generator)
        params.append(p)
    return params
