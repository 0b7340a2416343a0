"""Local training in which defenses act on the gradient of every example.

Abadi et al. 2016, arXiv:1607.00133, Algorithm 1 (DP-SGD), is the case of a flat clip and Gaussian noise: each
step takes a Poisson sample L of the client's data, sums the clipped gradients, adds noise, and divides by
the expected size B of L, not by |L|. Any other list of defenses does the same to the rows of gradients,
with the client in the server's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit.defense import DefenseStack, RoundContext
from fltoolkit.training.engines.base import draws
from fltoolkit.training.private.clipped import check_private, clipped_sum, per_example_rows
from fltoolkit.training.private.reference import opacus_clipped_sum
from fltoolkit.types import Examples, Layout, LocalSpec, Loss

OPACUS = "opacus"
"""The engine's name under which Opacus computes the clipped sum."""

ROWS_BYTES = 256 << 20
"""Rows of single examples that are in memory at once, where a defense must see rows."""


class Trainer:
    """Trains clients by steps that the defenses of `stack` act on, example by example."""

    def __init__(
        self, model: nn.Module, loss: Loss, stack: DefenseStack, local: LocalSpec, engine: str = ""
    ) -> None:
        check_private(model)
        self.model, self.loss, self.stack, self.local = deepcopy(model), loss, stack, local
        self.layout = Layout.of(model)
        named = dict(self.model.named_parameters())
        self.params = [named[n] for n in self.layout.names]
        self.sum_clipped = opacus_clipped_sum if engine == OPACUS else clipped_sum

    def __call__(
        self, start: Tensor, data: Examples, ctx: RoundContext, rng: np.random.Generator
    ) -> tuple[Tensor, int]:
        """w_k − w_t `[D]` from the start `[D]`, and how many steps had no example. ctx: of this client and
        round, see `fltoolkit.training.task.example_context`."""
        if draws(self.model):
            with torch.random.fork_rng(devices=[start.device] if start.is_cuda else []):
                torch.manual_seed(int(rng.spawn(1)[0].integers(2**62)))
                return self._steps(start, data, ctx, rng)
        return self._steps(start, data, ctx, rng)

    def _steps(
        self, start: Tensor, data: Examples, ctx: RoundContext, rng: np.random.Generator
    ) -> tuple[Tensor, int]:
        row, velocity, empty = start.clone(), torch.zeros_like(start), 0
        for step, index in enumerate(batches(ctx, rng)):
            empty += len(index) == 0
            self._load(row)
            gradient = self._gradient(data.take(torch.from_numpy(index)), index, ctx, step)
            velocity.mul_(self.local.momentum).add_(gradient)
            if self.local.weight_decay:
                velocity.add_(row, alpha=self.local.weight_decay)
            row.sub_(velocity, alpha=self.local.lr)
        return row.sub_(start), empty

    def _load(self, row: Tensor) -> None:
        with torch.no_grad():
            torch._foreach_copy_(tuple(self.params), list(self.layout.unflatten(row).values()))

    def _gradient(self, batch: Examples, index: np.ndarray, ctx: RoundContext, step: int) -> Tensor:
        """The mean gradient `[D]` over the expected batch, after every defense."""
        expected = ctx.sampling.rate * ctx.sampling.population
        ctx = replace(
            ctx,
            clients=tuple(index.tolist()),
            weights=torch.full((len(index),), 1 / expected, device=batch.x.device),
            where=(*ctx.where, "step", step),
        )
        norm = self.stack.flat_norm
        if norm is not None:
            total, _ = self.sum_clipped(self.model, self.loss, self.layout, batch.x, batch.y, norm)
        else:
            total = self._sum_of_rows(batch, ctx)
        return self.stack.server(total / expected, ctx)

    def _sum_of_rows(self, batch: Examples, ctx: RoundContext) -> Tensor:
        """Σ over the batch of what the defenses make of each example's gradient `[D]`."""
        total = self.params[0].new_zeros(self.layout.size)
        size = max(1, ROWS_BYTES // (self.layout.size * total.element_size()))
        for a in range(0, len(batch), size):
            part = slice(a, a + size)
            rows = per_example_rows(self.model, self.loss, self.layout, batch.x[part], batch.y[part])
            some = replace(ctx, clients=ctx.clients[part], weights=ctx.weights[part])
            total += self.stack.clients(rows, some).sum(0)
        return total


def batches(ctx: RoundContext, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices of each local step's examples: Poisson samples, or everybody."""
    n = ctx.sampling.population
    for _ in range(ctx.steps):
        if ctx.sampling.kind == "full":
            yield np.arange(n)
        else:
            yield np.flatnonzero(rng.random(n) < ctx.sampling.rate)
