"""Layers that compute what the ordinary ones do, faster.

For a model that only plain SGD will train, a linear layer adds its weight gradient to the weight in the
backward pass itself: w ← β w + α dᵀ x in one product, where autograd would write the gradient, read it, and
write the weight again. A convolution does the ReLU and the 2x2 max pooling that follow it: three quarters of
its outputs then have no gradient, and its backward pass leaves them out. Both call the compiled kernels
where those are to be had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fltoolkit.models import evaluating
from fltoolkit.training.engines import native


class _Descend(torch.autograd.Function):
    """y = x Wᵀ + b; the backward pass steps W and b and hands no gradient of theirs on.

    Saving W lets autograd refuse, loudly, a second use of W that comes after the step.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, beta: float, alpha: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.beta, ctx.alpha = beta, alpha
        if x.dim() == 2 and x.shape[1] == weight.shape[1] and native.fits(x, weight):
            return native.forward(x, weight, bias)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight, bias = ctx.saved_tensors
        if d.dim() == 2 and native.fits(d, x, weight):
            below = native.below(d, weight) if ctx.needs_input_grad[0] else None
            native.step(d, x, weight, bias, ctx.beta, ctx.alpha)
            return below, None, None, None, None
        below = d @ weight if ctx.needs_input_grad[0] else None
        d, x = d.reshape(-1, d.shape[-1]), x.reshape(-1, x.shape[-1])
        weight.addmm_(d.t(), x, beta=ctx.beta, alpha=ctx.alpha)
        if bias is not None:
            bias.mul_(ctx.beta).add_(d.sum(0), alpha=ctx.alpha)
        return below, None, None, None, None


def called_once(model: nn.Module, x: Tensor) -> frozenset[str]:
    """Names of the submodules that one forward pass calls exactly once, tried on the input x `[1, ...]`."""
    calls: Counter[str] = Counter()
    hooks = [
        m.register_forward_pre_hook(lambda _m, _x, n=n: calls.update([n])) for n, m in model.named_modules()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        for h in hooks:
            h.remove()
    return frozenset(n for n, count in calls.items() if count == 1)


class _DescendingLinear(nn.Linear):
    """A linear layer whose backward pass is its step: w ← beta · w + alpha · gradient."""

    beta: float
    alpha: float

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Descend.apply(x, self.weight, self.bias, self.beta, self.alpha)
        return result


def fuse(model: nn.Module, names: Collection[str], beta: float, alpha: float) -> None:
    """Turn the linear layers called `names`, in place, into ones that step as the backward pass goes by.

    Left alone: layers whose parameters are frozen or belong to another layer too, and subclasses.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, layer in model.named_modules():
        own = all(owners[id(p)] == 1 and p.requires_grad for p in layer.parameters(recurse=False))
        if name in names and type(layer) is nn.Linear and own:
            layer.__class__ = _DescendingLinear
            layer.beta, layer.alpha = beta, alpha  # type: ignore[assignment]


class _Pooled(torch.autograd.Function):
    """The 2x2 maxima of the ReLU of a convolution with stride 1, all in channels-last memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        z = F.conv2d(x, weight, bias, padding=padding).contiguous(memory_format=torch.channels_last)
        y, which = native.relu_pool(z)
        ctx.save_for_backward(x, weight, which)
        ctx.padding = padding
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        x, weight, which = ctx.saved_tensors
        below, _, biased, _ = ctx.needs_input_grad
        d = d.contiguous(memory_format=torch.channels_last)
        gx, gw, gb = native.conv_pool_back(x, weight, d, which, ctx.padding, below)
        return gx, gw, gb if biased else None, None


class PooledConv2d(nn.Conv2d):
    """A convolution with the ReLU and the pooling that follow it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and all(native.fits(t.permute(0, 2, 3, 1)) for t in (x, self.weight)):
            padding: tuple[int, int] = self.padding  # type: ignore[assignment]
            result: Tensor = _Pooled.apply(x, self.weight, self.bias, padding)
            return result
        return F.max_pool2d(F.relu(super().forward(x)), 2)


def join_with_pool(model: nn.Module, names: Collection[str], kind: type[nn.Conv2d] = PooledConv2d) -> None:
    """Let convolutions do the ReLU and 2x2 max pooling that follow them in a Sequential, by becoming layers
    of that kind, and those two nothing, in place; where all four are among `names`: a Sequential that is not
    called itself may be a mere list, whose layers somebody reads one by one."""
    wanted = {id(m) for n, m in model.named_modules() if n in names}
    for chain in [m for m in model.modules() if type(m) is nn.Sequential and id(m) in wanted]:
        for i in range(len(chain) - 2):
            conv, relu, pool = chain[i], chain[i + 1], chain[i + 2]
            called = all(id(layer) in wanted for layer in (conv, relu, pool))
            if called and slides(conv) and type(relu) is nn.ReLU and _halves(pool):
                conv.__class__ = kind
                chain[i + 1], chain[i + 2] = nn.Identity(), nn.Identity()


def slides(layer: nn.Module) -> bool:
    """Whether a layer is a plain convolution with stride 1."""
    if type(layer) is not nn.Conv2d or isinstance(layer.padding, str):
        return False
    plain = layer.groups == 1 and layer.padding_mode == "zeros"
    return plain and layer.stride == (1, 1) and layer.dilation == (1, 1)


def _halves(layer: nn.Module) -> bool:
    """Whether a layer is max pooling over 2x2 windows side by side, nothing else."""
    if type(layer) is not nn.MaxPool2d or layer.return_indices:
        return False
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
    pairs = [s if isinstance(s, tuple) else (s, s) for s in settings]
    return pairs == [(2, 2), (2, 2), (0, 0), (1, 1), (False, False)]
