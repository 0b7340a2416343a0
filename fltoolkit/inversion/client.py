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


def local_steps(gradient: Update, local: LocalSpec, clients: int) -> Update:
    """−Δ / (η u) of `clients` that hold equal, consecutive parts of the guess and each take their u local
    steps; batches are consecutive too, and the same in every epoch."""

    def one(params: State, buffers: State, x: Tensor, y: Tensor) -> State:
        size = local.batch or len(x)
        start, velocity = params, {n: torch.zeros_like(p) for n, p in params.items()}
        for _ in range(local.epochs):
            for part in range(0, len(x), size):
                g = gradient(params, buffers, x[part : part + size], y[part : part + size])
                decayed = {n: g[n] + local.weight_decay * p for n, p in params.items()}
                velocity = {n: local.momentum * velocity[n] + decayed[n] for n in params}
                params = {n: p - local.lr * velocity[n] for n, p in params.items()}
        total = local.lr * local.steps(len(x))
        return {n: (start[n] - params[n]) / total for n in params}

    def mean(params: State, buffers: State, x: Tensor, y: Tensor) -> State:
        found = [one(params, buffers, a, b) for a, b in zip(x.chunk(clients), y.chunk(clients), strict=True)]
        return {n: torch.stack([f[n] for f in found]).mean(0) for n in params}

    return one if clients == 1 else mean
