"""All clients' local steps as one recorded program: on a GPU a CUDA graph, elsewhere the same calls.

A step of a small network is some hundred operations of a few microseconds, fewer than Python can launch in
that time. Recorded once a run, they cost one launch a step. Convolutions of small batches are matrix
products here, since cuDNN's grouped ones, which clients with their own kernels would need, are slow. Large
batches fill a GPU by themselves: there each client has its own convolutions, on one of several streams.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import ceil, gcd

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fltoolkit.training.buffers import normalises_by_batch
from fltoolkit.training.engines import recurrent
from fltoolkit.training.engines.base import Stacked, in_callers_order, most_first
from fltoolkit.training.engines.fused import slides
from fltoolkit.training.engines.looped import separable
from fltoolkit.training.engines.vmapped import Vmapped
from fltoolkit.types import Examples, LocalSpec, Loss

RECORDED_AT = 3
"""The use of a program at which it is recorded; one that is used less is not worth it."""

AT_ONCE = 2000
"""Examples of all clients that pass the model together, where no layer mixes them; more fill the memory."""

ALONE_FROM = 50
"""Examples of a client in a step from which its convolutions are its own."""

STREAMS = 10
"""On which such clients' steps run side by side."""

KEPT = 2
"""Shapes of cohorts whose programs are kept: that of a round's chunks and that of what is left over."""

Shape = tuple[tuple[int, ...], tuple[int, ...], int, LocalSpec]


class Graphed(Vmapped):
    """What `Vmapped` trains, its steps recorded. Programs and their memory are kept between rounds."""

    name = "graphed"
    about = "any module, all clients' steps as one CUDA graph; best on a GPU"

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        self.separable = separable(model)
        self.flat = deepcopy(model)
        recurrent.speed_up_vmapped(self.flat)
        self.convolves = self.separable and flatten_convolutions(self.flat)
        self.kept: dict[Shape, _Cohort] = {}

    def __call__(
        self,
        params: Tensor,
        data: Sequence[Examples],
        local: LocalSpec,
        rngs: Sequence[np.random.Generator],
    ) -> Tensor:
        sizes = {len(d) for d in data}
        short = len(sizes) > 1 or any(n % min(local.batch or n, n) for n in sizes)
        if short and normalises_by_batch(self.model):
            return super().__call__(params, data, local, rngs)
        order = most_first(data)
        stacked = Stacked.of([data[k] for k in order], local, [rngs[k] for k in order])
        batches = stacked.epoch(local.batch)
        x, y = (t[:, batches[0][0]] for t in (stacked.x, stacked.y))
        key = (tuple(x.shape), tuple(y.shape[2:]), params.numel(), replace(local, lr=0.0))
        if key not in self.kept:
            for oldest in list(self.kept)[: max(0, len(self.kept) - KEPT + 1)]:
                del self.kept[oldest]
            self.kept[key] = _Cohort(self, params, x, y, local)
        cohort = self.kept[key]
        cohort.begin(params, local.lr)
        for _ in range(local.epochs):
            for part, held in batches:
                cohort.step(stacked.x[:, part], stacked.y[:, part], held)
        return in_callers_order(cohort.rows - params, order)


class _Cohort:
    """The clients' parameters `[K, D]` and the programs that step the first 1, 2, 4, ... K of them."""

    def __init__(self, engine: Graphed, params: Tensor, x: Tensor, y: Tensor, local: LocalSpec) -> None:
        self.engine, self.local = engine, local
        self.rows = params.expand(len(x), -1).clone()
        self.velocity = torch.zeros_like(self.rows) if local.momentum else self.rows[:, :0]
        self.x, self.y = torch.zeros_like(x), torch.zeros_like(y)
        self.scale = self.rows.new_zeros(x.shape[:2])
        self.descent = self.rows.new_zeros(())
        self.programs: dict[int, Callable[[], object]] = {}
        self.buffers = {n: b.expand(len(x), *b.shape) for n, b in engine.flat.named_buffers()}
        self.gradient = vmap(grad(partial(self._loss, engine.flat)))
        self.gradient_alone = grad(partial(self._loss, engine.model))
        self.alone = engine.convolves and x.shape[1] >= ALONE_FROM
        self.streams = [torch.cuda.Stream() for _ in range(STREAMS)] if x.is_cuda and self.alone else []
        at_once = AT_ONCE // (1 if self.alone else len(x))
        self.pieces = ceil(x.shape[1] / max(1, at_once)) if engine.separable else 1

    def begin(self, params: Tensor, lr: float) -> None:
        self.descent.fill_(-lr)
        self.rows.copy_(params.expand_as(self.rows))
        self.velocity.zero_()

    def step(self, x: Tensor, y: Tensor, held: Tensor) -> None:
        """One step of the clients with examples left: held `[active]` of the places in x `[K, b, *]`."""
        active = len(held)
        count = min(len(self.rows), 1 << (active - 1).bit_length())
        if count not in self.programs:
            self.programs[count] = (
                Recorded(self._step, count) if self.rows.is_cuda else partial(self._step, count)
            )
        width = x.shape[1]
        self.x[:count, :width].copy_(x[:count])
        self.y[:count, :width].copy_(y[:count])
        places = torch.arange(self.scale.shape[1], device=x.device)
        self.scale[:count] = 0
        self.scale[:active] = (places < held[:, None]) / held[:, None]
        self.programs[count]()

    def _step(self, count: int) -> None:
        """w ← w − η v, v ← μ v + ∇ℓ + λ w of the first `count` clients, those without examples left alone."""
        weights = list(self.engine.layout.unflatten(self.rows[:count]).values())
        found = self._gradients(count)
        with torch.no_grad():
            if self.local.weight_decay:
                torch._foreach_add_(found, weights, alpha=self.local.weight_decay)
            if self.local.weight_decay or self.local.momentum:
                active = (self.scale[:count].sum(1) > 0).to(self.rows)
                steps = [active.view(-1, *[1] * (w.dim() - 1)) for w in weights]
                torch._foreach_mul_(found, steps)
                if self.local.momentum:
                    found = self._moved(count, found, steps)
            for w, g in zip(weights, found, strict=True):
                w.addcmul_(g, self.descent)

    def _moved(self, count: int, found: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
        """v ← μ v + found where steps is 1, and v there; 0 where it is 0."""
        moving = list(self.engine.layout.unflatten(self.velocity[:count]).values())
        torch._foreach_mul_(moving, [1 - (1 - self.local.momentum) * s for s in steps])
        torch._foreach_add_(moving, found)
        return [v * s for v, s in zip(moving, steps, strict=True)]

    def _gradients(self, count: int) -> list[Tensor]:
        """Each client's by each parameter, `[count, ...]`, summed over pieces of the batch."""
        params = self.engine.layout.unflatten(self.rows[:count])
        total: list[Tensor] = []
        parts = (t[:count].chunk(self.pieces, 1) for t in (self.x, self.y, self.scale))
        for x, y, scale in zip(*parts, strict=True):
            buffers = {n: b[:count].clone() for n, b in self.buffers.items()}
            together = self._alone if self.alone else self.gradient
            found = list(together(params, buffers, x, y, scale).values())
            if total:
                torch._foreach_add_(total, found)
            total = total or found
        return total

    def _alone(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor, scale: Tensor
    ) -> dict[str, Tensor]:
        """What `gradient` gives, a client after the other on each stream."""
        found, used = [], self.streams[: len(x)]
        for stream in used:
            stream.wait_stream(torch.cuda.current_stream())
        for k in range(len(x)):
            with torch.cuda.stream(used[k % len(used)] if used else None):
                own, kept = ({n: _channels_last(t[k]) for n, t in d.items()} for d in (params, buffers))
                found.append(self.gradient_alone(own, kept, _channels_last(x[k]), y[k], scale[k]))
        for stream in used:
            torch.cuda.current_stream().wait_stream(stream)
        return {n: torch.stack([f[n] for f in found]) for n in params}

    def _loss(
        self,
        model: nn.Module,
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        scale: Tensor,
    ) -> Tensor:
        logits = functional_call(model, (params, buffers), (x,))
        return (self.engine.loss(logits, y) * scale).sum()


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


class Recorded:
    """step(count) on a GPU: run as it is the first times, which also warms the libraries up, then recorded
    and replayed. What cannot be recorded, since it waits for the GPU, runs as it is."""

    def __init__(self, step: Callable[[int], None], count: int) -> None:
        self.step, self.count, self.uses = step, count, 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.uses += 1
        if self.uses == RECORDED_AT:
            self._record()
        if self.graph is not None:
            self.graph.replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step(self.count)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _record(self) -> None:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.collect()  # a graph that is freed during a recording ends it
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.step(self.count)
            self.graph = graph
        except RuntimeError as e:
            warnings.warn(f"local training is slower, its step cannot be recorded: {e}", stacklevel=2)
        finally:
            if collects:
                gc.enable()


class _Product(torch.autograd.Function):
    """A convolution with stride 1 as a matrix product over its windows, and so its backward pass.

    Images keep their channels last in memory, so that a window's rows are contiguous. Returns the windows
    too, for the backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> tuple[Tensor, Tensor]:
        windows = _windows(x.permute(0, 2, 3, 1), weight.shape[2:], padding)
        n, h, w = windows.shape[:3]
        out = torch.addmm(bias, windows.reshape(n * h * w, -1), _kernels(weight).t())
        return out.view(n, h, w, -1).permute(0, 3, 1, 2), windows

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, weight, _, ctx.padding = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, output[1])

    @staticmethod
    def backward(ctx, d: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        weight, windows = ctx.saved_tensors
        n, h, w = windows.shape[:3]
        d = d.permute(0, 2, 3, 1).reshape(n * h * w, -1)
        groups = gcd(n, GROUPS)
        by_group = d.view(groups, -1, d.shape[1]).transpose(1, 2) @ windows.view(groups, len(d) // groups, -1)
        gw = by_group.sum(0).view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = _unwindowed((d @ _kernels(weight)).view(windows.shape), ctx.padding).permute(0, 3, 1, 2)
        return gx, gw, d.sum(0), None


GROUPS = 20
"""Examples of a client whose kernel gradients are summed at the end: as many products keep a GPU busy."""


def _windows(x: Tensor, kernel: Sequence[int], padding: tuple[int, int]) -> Tensor:
    """Every window of x `[n, h, w, c]`, `[n, h', w', k, k, c]`."""
    padded = nn.functional.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return padded.unfold(1, kernel[0], 1).unfold(2, kernel[1], 1).permute(0, 1, 2, 4, 5, 3).contiguous()


def _unwindowed(windows: Tensor, padding: tuple[int, int]) -> Tensor:
    """What each place of an image gets from the windows that hold it; the transpose of `_windows`."""
    n, h, w, high, wide, c = windows.shape
    rows = windows.new_zeros(n, h, w + wide - 1, high, c)
    for j in range(wide):
        rows[:, :, j : j + w] += windows[:, :, :, :, j]
    image = windows.new_zeros(n, h + high - 1, w + wide - 1, c)
    for i in range(high):
        image[:, i : i + h] += rows[:, :, :, i]
    top, left = padding
    return image[:, top : image.shape[1] - top, left : image.shape[2] - left]


def _kernels(weight: Tensor) -> Tensor:
    """weight `[out, c, k, k]` as rows `[out, k k c]`."""
    return weight.permute(0, 2, 3, 1).flatten(1)


class _FlatConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        padding: tuple[int, int] = self.padding  # type: ignore[assignment]
        bias = self.weight.new_zeros(self.out_channels) if self.bias is None else self.bias
        result: Tensor = _Product.apply(x, self.weight, bias, padding)[0]
        return result


def flatten_convolutions(model: nn.Module) -> bool:
    """Turn the plain convolutions in `model`, in place, into matrix products; whether there were any."""
    for layer in model.modules():
        if slides(layer) and all(p < k for p, k in zip(layer.padding, layer.kernel_size, strict=True)):  # type: ignore[arg-type]
            layer.__class__ = _FlatConv2d
    return any(isinstance(layer, _FlatConv2d) for layer in model.modules())
