"""Any module that torch.func can differentiate: all clients step together in one vmapped program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fltoolkit.training.buffers import normalises_by_batch
from fltoolkit.training.engines.base import Engine, Stacked, draws, in_callers_order, most_first
from fltoolkit.types import Examples, LocalSpec, Loss


class Vmapped(Engine):
    """Parameters are one matrix `[K, D]` and the gradient is vmapped over its rows."""

    name = "vmapped"
    about = "any module, all clients as one torch.func program; best where many small steps meet a GPU"

    @classmethod
    def refuses(cls, model: nn.Module, loss: Loss, input_shape: tuple[int, ...]) -> str | None:
        return "its forward pass draws random numbers" if draws(model) else None

    def __call__(
        self,
        params: Tensor,
        data: Sequence[Examples],
        local: LocalSpec,
        rngs: Sequence[np.random.Generator],
    ) -> Tensor:
        order = most_first(data)
        stacked = Stacked.of([data[k] for k in order], local, [rngs[k] for k in order])
        rows = params.expand(len(data), -1).clone()
        velocity = torch.zeros_like(rows)
        gradient = vmap(grad(self._masked_loss))
        buffers = {n: b.expand(len(data), *b.shape) for n, b in self.model.named_buffers()}
        batches = stacked.epoch(local.batch)
        for _ in range(local.epochs):
            for part, held in batches:
                for k, width in self._together(held, stacked.x[:, part].shape[1]):
                    x, y = (t[k, part][:, :width] for t in (stacked.x, stacked.y))
                    mask = (torch.arange(width, device=x.device) < held[k][:, None]).to(rows)
                    active = {n: b[k].clone() for n, b in buffers.items()}
                    g = gradient(rows[k], active, x, y, mask)
                    velocity[k] = local.momentum * velocity[k] + g + local.weight_decay * rows[k]
                    rows[k] -= local.lr * velocity[k]
        return in_callers_order(rows.sub_(params), order)

    def _together(self, held: Tensor, width: int) -> list[tuple[Tensor | slice, int]]:
        """Which of the active clients step together, and on how many places: all on `width`, unless the model
        normalises by the batch, where what fills a short one up would count."""
        if not normalises_by_batch(self.model):
            return [(slice(len(held)), width)]
        return [((held == n).nonzero()[:, 0], n) for n in held.unique().tolist()]

    def _masked_loss(
        self, row: Tensor, buffers: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor
    ) -> Tensor:
        logits = functional_call(self.model, (self.layout.unflatten(row), buffers), (x,))
        return (self.loss(logits, y) * mask).sum() / mask.sum()
