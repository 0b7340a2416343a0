"""Layers that compute what the ordinary ones do, faster, for a model that only plain SGD will train.

A linear layer adds its weight gradient to the weight in the backward pass itself: w ← β w + α dᵀ x in one
product, where autograd would write the gradient, read it, and write the weight again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fltoolkit.models import evaluating


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
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight, bias = ctx.saved_tensors
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
