"""ClientUpdate for a whole cohort at once.

McMahan et al. 2017, arXiv:1602.05629, Algorithm 1: split the client's data into batches of size B (once,
in random order), then for each of E epochs and each batch b: w ← w − η ∇ℓ(w; b).

All K clients step together: their parameters are one matrix `[K, D]` and the gradient is vmapped over
its rows. Clients with fewer examples or steps are padded, and padding has weight zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fltoolkit.types import Examples, Layout, LocalSpec, Loss


@dataclass(frozen=True)
class _Schedule:
    """index `[K, steps, B]` into each client's examples; mask of the same shape, 1 where real."""

    index: Tensor
    mask: Tensor


def client_updates(
    model: nn.Module,
    loss: Loss,
    params: Tensor,
    data: Sequence[Examples],
    local: LocalSpec,
    rngs: Sequence[np.random.Generator],
) -> Tensor:
    """w_k − w_t of every client, `[K, D]`, from the shared `params [D]`; rngs order each client's data."""
    layout = Layout.of(model)
    x, y = _padded([d.x for d in data]), _padded([d.y for d in data])
    schedule = _schedule([len(d) for d in data], local, rngs, x.device)
    clients = torch.arange(len(data), device=x.device)[:, None]
    buffers = {n: b.expand(len(data), *b.shape).clone() for n, b in model.named_buffers()}

    def masked_loss(row: Tensor, buffer: dict[str, Tensor], bx: Tensor, by: Tensor, mask: Tensor) -> Tensor:
        logits = functional_call(model, (layout.unflatten(row), buffer), (bx,))
        return (loss(logits, by) * mask).sum() / mask.sum().clamp_min(1.0)

    gradient = vmap(grad(masked_loss))
    rows = params.expand(len(data), -1).clone()
    for _ in range(local.epochs):
        for index, mask in zip(schedule.index.unbind(1), schedule.mask.unbind(1), strict=True):
            rows = rows - local.lr * gradient(rows, buffers, x[clients, index], y[clients, index], mask)
    return rows - params


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors `[n_k, ...]` -> `[K, max n_k, ...]`, short ones filled with zeros."""
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _schedule(
    sizes: Sequence[int], local: LocalSpec, rngs: Sequence[np.random.Generator], device: torch.device
) -> _Schedule:
    largest = max(sizes)
    width = largest if local.batch is None else min(local.batch, largest)
    steps = -(-largest // width)
    index = np.zeros((len(sizes), steps * width), np.int64)
    mask = np.zeros((len(sizes), steps * width), np.float32)
    for k, (n, rng) in enumerate(zip(sizes, rngs, strict=True)):
        index[k, :n] = rng.permutation(n)
        mask[k, :n] = 1.0
    shape = (len(sizes), steps, width)
    return _Schedule(
        torch.from_numpy(index.reshape(shape)).to(device), torch.from_numpy(mask.reshape(shape)).to(device)
    )
