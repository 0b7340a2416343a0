"""What a client would send for a guess: the public recipe of local training, differentiable in the data.

For one step that is the gradient of the batch. For several, the steps are run through with a graph kept
(Geiping et al. 2020, arXiv:2003.14053, section 6), and the update is read as one gradient, −Δ / (η u).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fltoolkit.types import LocalSpec, Loss

State = dict[str, Tensor]
Update = Callable[[State, State, Tensor, Tensor], State]
"""`update(params, buffers, x [N, ...], y) -> {name: tensor}` in the layout of the parameters."""
Descent = Callable[[State, State, Tensor, Tensor, Tensor | float], State]
"""The same with the step size η as last argument."""


def one_step(model: nn.Module, loss: Loss) -> Update:
    """The gradient of the mean loss."""

    def batch_loss(params: State, buffers: State, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, (params, buffers), (x,)), y).mean()

    return grad(batch_loss)


def eager_step(model: nn.Module, loss: Loss) -> Update:
    """The same by plain double-backward autograd, for one guess at a time; parameters must require grad."""

    def gradient(params: State, buffers: State, x: Tensor, y: Tensor) -> State:
        value = loss(functional_call(model, (params, buffers), (x,)), y).mean()
        found = torch.autograd.grad(value, list(params.values()), create_graph=True)
        return dict(zip(params, found, strict=True))

    return gradient


def in_bf16(gradient: Update) -> Update:
    """The same with matrix products and convolutions in bfloat16, forwards and backwards: about three digits,
    at the range of float32."""

    def reduced(params: State, buffers: State, x: Tensor, y: Tensor) -> State:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return gradient(params, buffers, x, y)

    return reduced


def local_steps(gradient: Update, local: LocalSpec, clients: int, sets: int = 1) -> Update:
    """−Δ / (η u) of `clients` that hold equal, consecutive parts of the guess and each take their u local
    steps; batches are consecutive too, and the same in every epoch. With sets = E, the guess holds a data set
    for each epoch, one after the other."""
    run = descent(gradient, local, clients, sets)

    def update(params: State, buffers: State, x: Tensor, y: Tensor) -> State:
        total = local.lr * local.steps(len(x) // (sets * clients))
        moved = run(params, buffers, x, y, local.lr)
        return {n: m / total for n, m in moved.items()}

    return update


def descent(gradient: Update, local: LocalSpec, clients: int, sets: int = 1) -> Descent:
    """w_0 − w_u, the mean over clients, with the step size as an argument; otherwise as `local_steps`."""

    def one(params: State, buffers: State, x: Tensor, y: Tensor, lr: Tensor | float) -> State:
        count = len(x) // sets
        size = min(local.batch or count, count)
        start, velocity = params, {n: torch.zeros_like(p) for n, p in params.items()}
        for epoch in range(local.epochs):
            first = epoch * count if sets > 1 else 0
            for part in range(first, first + count, size):
                end = min(part + size, first + count)
                g = gradient(params, buffers, x[part:end], y[part:end])
                decayed = {n: g[n] + local.weight_decay * p for n, p in params.items()}
                velocity = {n: local.momentum * velocity[n] + decayed[n] for n in params}
                params = {n: p - lr * velocity[n] for n, p in params.items()}
        return {n: start[n] - params[n] for n in params}

    def mean(params: State, buffers: State, x: Tensor, y: Tensor, lr: Tensor | float) -> State:
        parts = zip(_shares(x, clients, sets), _shares(y, clients, sets), strict=True)
        found = [one(params, buffers, a, b, lr) for a, b in parts]
        return {n: torch.stack([f[n] for f in found]).mean(0) for n in params}

    return one if clients == 1 else mean


def _shares(data: Tensor, clients: int, sets: int) -> list[Tensor]:
    """Each client's consecutive part of every one of the data sets in `data [sets N, ...]`."""
    return [part.flatten(0, 1) for part in data.unflatten(0, (sets, -1)).chunk(clients, 1)]
