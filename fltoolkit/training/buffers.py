"""BatchNorm's buffers as a client holds them after local training, and sends where it sends all its state."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fltoolkit.types import Layout


def norms_in_training(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of `model` that normalise by the batch and keep running statistics of it."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in layers if m.training and m.track_running_stats]


def normalises_by_batch(model: nn.Module) -> bool:
    """Whether an example's output depends on the others of its batch."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return any(m.training or not m.track_running_stats for m in layers)


@torch.no_grad()
def after_one_step(model: nn.Module, params: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The buffers by name after one local step from `params [D]` on the batch x `[N, *shape]`, whose forward
    pass moves the running statistics. Layers that draw are in evaluation mode; the model stays as it is."""
    client = deepcopy(model)
    learning = norms_in_training(client)
    client.eval()
    for layer in learning:
        layer.train()
    functional_call(client, Layout.of(client).unflatten(params), (x,))
    return {n: b.clone() for n, b in client.named_buffers()}
