"""Layers that multiply in bfloat16 and add in float32, which processors with tiles for it (AMX) do several
times as fast as they multiply in float32.

Parameters, their steps and sums of gradients over pieces of a batch stay in float32. Rounding is monotone, so
that ReLU and max pooling of rounded numbers are the rounded ReLU and max pooling: a convolution with its
pooling loses nothing beyond what the next product would round.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fltoolkit.models.text import PeepholeLstm
from fltoolkit.training.engines import native, native_lstm
from fltoolkit.training.engines.fused import PooledConv2d, join_with_pool
from fltoolkit.training.engines.recurrent import FastLstm
from fltoolkit.types import LocalSpec

FROM = {nn.Conv2d: 8, nn.Linear: 32, PeepholeLstm: 1}
"""Examples in a batch, or tokens in one of text, from which on the rounding of a layer's weights costs less
than it saves."""

PIECE = 300
"""Examples that pass a model together: activations are half as long, and each piece rounds the weights."""


def layers(local: LocalSpec, label: Tensor) -> Collection[type[nn.Module]]:
    """Kinds of layers that shall compute in bfloat16 in a client's steps, for examples with such a label."""
    tokens = inf if local.batch is None else local.batch * label.numel()
    return [kind for kind, least in FROM.items() if local.precision == "bf16" and tokens >= least]


def shorten(model: nn.Module, names: Collection[str], kinds: Collection[type[nn.Module]]) -> None:
    """Let a model's layers of these kinds multiply in bfloat16, in place; of the convolutions, those called
    `names` do the ReLU and the pooling that follow them, as `join_with_pool` has it. Layers give float32,
    except where the next one in a Sequential would round that again. LSTMs that `recurrent.speed_up` has not
    made fast, or for whose units the processor has no tiles, stay as they are."""
    once = {id(m) for n, m in model.named_modules() if n in names}
    join_with_pool(model, names, _BriefPooledConv2d if nn.Conv2d in kinds else PooledConv2d)
    for layer in model.modules():
        if type(layer) in kinds and type(layer) in _BRIEF:
            layer.__class__ = _BRIEF[type(layer)]
        elif type(layer) is FastLstm and PeepholeLstm in kinds:
            layer.short = native_lstm.tiles_fit(layer.units)
    for chain in [m for m in model.modules() if type(m) is nn.Sequential and id(m) in once]:
        rounds = False
        for layer in reversed(chain):
            if isinstance(layer, _Brief):
                layer.stays = rounds and id(layer) in once
            rounds = isinstance(layer, _Brief) or (rounds and type(layer) in _KEEP_ROUNDED)


def _rounded(t: Tensor) -> Tensor:
    images = t.dim() == 4
    return t.to(torch.bfloat16, memory_format=torch.channels_last if images else torch.preserve_format)


def _weights(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    return _rounded(layer.weight), None if layer.bias is None else _rounded(layer.bias)


class _BriefPooled(torch.autograd.Function):
    """The 2x2 maxima of the ReLU of a convolution with stride 1, of images and weights in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        z = F.conv2d(x, weight, bias, padding=padding).contiguous(memory_format=torch.channels_last)
        y, which = native.relu_pool(z)
        ctx.save_for_backward(x, weight, which)
        ctx.padding, ctx.size = padding, z.shape[2:]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, which = ctx.saved_tensors
        d = d.contiguous(memory_format=torch.channels_last)
        if native.few(weight) and not ctx.needs_input_grad[0]:
            gw, gb = native.conv_pool_grad(x, weight, d, which, ctx.padding)
            return None, gw, gb if ctx.needs_input_grad[2] else None, None
        found = torch.ops.aten.convolution_backward(
            *(native.unpool(d, which, *ctx.size), x, weight, [len(weight)], [1, 1], ctx.padding),
            *([1, 1], False, [0, 0], 1, ctx.needs_input_grad[:3]),
        )
        return *found, None


class _Brief(nn.Module):
    """A layer that gives its output rounded (`stays`), or as the same numbers in float32."""

    stays = False

    def given(self, y: Tensor) -> Tensor:
        return y if self.stays else y.float()


class _BriefPooledConv2d(_Brief, nn.Conv2d):
    """A convolution in bfloat16 with the ReLU and the pooling that follow it."""

    def forward(self, x: Tensor) -> Tensor:
        x, (weight, bias) = _rounded(x), _weights(self)
        if x.dim() == 4 and native.fits(x.permute(0, 2, 3, 1), dtype=torch.bfloat16):
            padding: tuple[int, int] = self.padding  # type: ignore[assignment]
            return self.given(_BriefPooled.apply(x, weight, bias, padding))
        return self.given(F.max_pool2d(F.relu(self._conv_forward(x, weight, bias)), 2))


class _BriefConv2d(_Brief, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.given(self._conv_forward(_rounded(x), *_weights(self)))


class _BriefLinear(_Brief, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.given(F.linear(_rounded(x), *_weights(self)))


_BRIEF: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _BriefConv2d, nn.Linear: _BriefLinear}
_KEEP_ROUNDED = (nn.Identity, nn.Flatten, nn.ReLU, nn.MaxPool2d)
