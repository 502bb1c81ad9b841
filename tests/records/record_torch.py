"""Records 200 steps of the source's PyTorch loops: `python tests/records/record_torch.py`."""

import pathlib

import numpy as np
import torch
from problem import CHECKPOINTS, LEARNING_RATES, NAMES, STEPS, initial, save


def train(scope: str, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """The source's loop: backward, divide the gradient by its norm, step."""
    arrays = initial()
    inputs = torch.tensor(arrays["inputs"], dtype=dtype)
    labels = torch.tensor(arrays["labels"])
    parameters = [torch.nn.Parameter(torch.tensor(arrays[n], dtype=dtype)) for n in NAMES]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATES[scope])
    losses = []
    checkpoints = []
    for step in range(STEPS):
        x = inputs[step]
        for i in range(3):
            x = x @ parameters[2 * i] + parameters[2 * i + 1]
            x = torch.tanh(x) if i < 2 else x
        loss = torch.nn.functional.cross_entropy(x, labels[step])
        optimizer.zero_grad()
        loss.backward()
        if scope == "leaf":
            for p in parameters:
                p.grad /= torch.norm(p.grad)
        else:
            whole = torch.norm(torch.stack([torch.norm(p.grad) for p in parameters]))
            for p in parameters:
                p.grad /= whole
        optimizer.step()
        losses.append(loss.item())
        if step + 1 in CHECKPOINTS:
            checkpoints.append([p.detach().numpy().copy() for p in parameters])
    parameters_at = map(np.stack, zip(*checkpoints, strict=True))
    return {"losses": np.array(losses), **dict(zip(NAMES, parameters_at, strict=True))}


def main() -> None:
    """Records both scopes in both precisions, and what the loop does to a zero gradient."""
    records = {}
    for scope in LEARNING_RATES:
        for dtype in (torch.float64, torch.float32):
            key = f"{scope}_{str(dtype).removeprefix('torch.')}"
            records |= {f"{key}_{name}": x for name, x in train(scope, dtype).items()}
    p = torch.nn.Parameter(torch.zeros(3))
    (p * 0.0).sum().backward()
    assert p.grad is not None
    p.grad /= torch.norm(p.grad)
    records["zero_gradient"] = p.grad.numpy()
    save(str(pathlib.Path(__file__).with_name("torch.npz")), torch.__version__, records)


if __name__ == "__main__":
    main()
