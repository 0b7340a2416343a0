"""One client after the other with autograd, as many at once as there are threads.

Made for convolutions and recurrence on a CPU, where a client's step is large enough to fill a core and
batching clients only costs memory traffic. Each worker owns a copy of the model in channels-last memory
whose linear and recurrent layers are swapped for faster ones that compute the same (`fused`, `recurrent`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit.training.engines import brief, recurrent
from fltoolkit.training.engines.base import Engine, draws, each_on_its_core, in_visiting_order
from fltoolkit.training.engines.fused import called_once, fuse
from fltoolkit.types import Examples, Layout, LocalSpec, Loss

PIECE = 100
"""Examples that pass a model together; the activations of more would not stay in a core's cache."""

_SEPARATE: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.Linear,
    nn.ReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    nn.Flatten,
    nn.Identity,
)
_SEPARATE += (nn.MaxPool2d, nn.AvgPool2d, nn.LocalResponseNorm, nn.GroupNorm, nn.LayerNorm)


def separable(model: nn.Module) -> bool:
    """Whether each example's output is known to depend on that example alone: chains of layers that do not
    mix a batch's examples. Their gradient over a large batch is a sum over pieces of it."""
    if type(model) is nn.Sequential:
        return all(separable(m) for m in model)
    return type(model) in _SEPARATE


class Looped(Engine):
    """Any module that autograd can differentiate."""

    name = "looped"
    about = "any module, a client a thread; best for convolutions and recurrence on CPUs"

    def __call__(
        self,
        params: Tensor,
        data: Sequence[Examples],
        local: LocalSpec,
        rngs: Sequence[np.random.Generator],
    ) -> Tensor:
        out = params.new_empty(len(data), params.numel())
        alone = params.device.type != "cpu" or draws(self.model)
        # Random numbers come from one global generator, so a model that draws trains client by client.
        threads = 1 if alone else min(torch.get_num_threads(), len(data))
        once, short = called_once(self.model, data[0].x[:1]), brief.layers(local, data[0].y[0])
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(threads):
            idle.put(_Worker(self.model, self.loss, self.layout, local, once, short))

        def train(k: int) -> None:
            worker = idle.get()
            try:
                out[k] = worker.train(params, in_visiting_order(data[k], local, rngs[k]))
            finally:
                idle.put(worker)

        if threads == 1:
            with torch.random.fork_rng(devices=[params.device] if params.is_cuda else []):
                for k, rng in enumerate(rngs):
                    torch.manual_seed(int(rng.spawn(1)[0].integers(2**62)))
                    train(k)
            return out
        each_on_its_core(train, range(len(data)), threads)
        return out


class _Worker:
    """A copy of the model that trains one client at a time."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        layout: Layout,
        local: LocalSpec,
        once: frozenset[str],
        short: Collection[type[nn.Module]],
    ) -> None:
        self.loss, self.layout, self.local, self.source = loss, layout, local, model
        self.model = deepcopy(model)
        if next(model.parameters()).device.type == "cpu":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        named = dict(self.model.named_parameters())
        self.params: list[Tensor] = [named[n] for n in layout.names]
        self.velocity = [torch.zeros_like(p) for p in self.params] if local.momentum else []
        recurrent.speed_up(self.model)
        size = brief.PIECE if nn.Linear in short else PIECE
        self.piece = size if separable(self.model) else None
        brief.shorten(self.model, once, short)
        whole = self.piece is None or (local.batch is not None and local.batch <= self.piece)
        if whole and not self.velocity:
            fuse(self.model, once, 1 - local.lr * local.weight_decay, -local.lr)

    def train(self, start: Tensor, data: Examples) -> Tensor:
        """w_k − w_t `[D]` from the start `[D]`, on a client's examples in visiting order."""
        self._reset(start)
        size = self.local.batch or len(data)
        for _ in range(self.local.epochs):
            for x, y in zip(data.x.split(size), data.y.split(size), strict=True):
                self._step(x, y)
        with torch.no_grad():
            flat = {n: p.detach() for n, p in zip(self.layout.names, self.params, strict=True)}
            return self.layout.flatten(flat).sub_(start)

    @torch.no_grad()
    def _reset(self, start: Tensor) -> None:
        pieces = self.layout.unflatten(start).values()
        torch._foreach_copy_(self.params, list(pieces))
        for mine, theirs in zip(self.model.buffers(), self.source.buffers(), strict=True):
            mine.copy_(theirs)
        for v in self.velocity:
            v.zero_()

    def _step(self, x: Tensor, y: Tensor) -> None:
        """w ← w − η v, v ← μ v + g + λ w. A fused layer gives no gradient: it has taken its step."""
        if x.dim() == 4 and x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        found = self._gradient(x, y)
        with torch.no_grad():
            if self.velocity:
                self._momentum_step(found)
            else:
                self._plain_step([(p, g) for p, g in zip(self.params, found, strict=True) if g is not None])

    def _gradient(self, x: Tensor, y: Tensor) -> Sequence[Tensor | None]:
        """Of the mean loss by each parameter, summed over pieces of a large batch."""
        size = self.piece or len(x)
        total: Sequence[Tensor | None] = ()
        for a, b in zip(x.split(size), y.split(size), strict=True):
            loss = self.loss(self.model(a), b).sum() / len(x)
            found = torch.autograd.grad(loss, self.params, allow_unused=True)
            if total:
                pairs = [(t, f) for t, f in zip(total, found, strict=True) if t is not None and f is not None]
                torch._foreach_add_([t for t, _ in pairs], [f for _, f in pairs])
            else:
                total = found
        return total

    def _plain_step(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        if not pairs:
            return
        params, grads = [p for p, _ in pairs], [g for _, g in pairs]
        if self.local.weight_decay:
            torch._foreach_mul_(params, 1 - self.local.lr * self.local.weight_decay)
        torch._foreach_add_(params, grads, alpha=-self.local.lr)

    def _momentum_step(self, found: Sequence[Tensor | None]) -> None:
        g = [torch.zeros_like(p) if f is None else f for p, f in zip(self.params, found, strict=True)]
        torch._foreach_mul_(self.velocity, self.local.momentum)
        torch._foreach_add_(self.velocity, g)
        if self.local.weight_decay:
            torch._foreach_add_(self.velocity, self.params, alpha=self.local.weight_decay)
        torch._foreach_add_(self.params, self.velocity, alpha=-self.local.lr)
