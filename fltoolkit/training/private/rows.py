"""Every example's gradient as a row: the general way, for any model and for defenses that want rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fltoolkit.types import Layout, Loss


def per_example_rows(model: nn.Module, loss: Loss, layout: Layout, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of loss(model(x_i), y_i) by the parameters of `layout` for every example, `[B, D]`.

    By `torch.func` over all examples at once; one after the other where a layer of the model cannot do that.
    x `[B, ..]`, y `[B, ..]`. The model and its `.grad` stay as they are.
    """
    named = dict(model.named_parameters())
    params = {n: named[n].detach() for n in layout.names}
    if len(x) == 0:
        return next(iter(params.values())).new_zeros(0, layout.size)

    def one(params: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return loss(functional_call(model, params, (a[None],)), b[None]).sum()

    try:
        return layout.flatten(vmap(grad(one), (None, 0, 0), randomness="different")(params, x, y))
    except RuntimeError:
        return _one_by_one(model, loss, layout, x, y)


@torch.enable_grad()
def _one_by_one(model: nn.Module, loss: Loss, layout: Layout, x: Tensor, y: Tensor) -> Tensor:
    named = dict(model.named_parameters())
    params = [named[n] for n in layout.names]
    rows = params[0].new_zeros(len(x), layout.size)
    for i, row in enumerate(rows):
        total = loss(model(x[i : i + 1]), y[i : i + 1]).sum()
        found = torch.autograd.grad(total, params, allow_unused=True)
        for out, g in zip(layout.unflatten(row).values(), found, strict=True):
            if g is not None:
                out.copy_(g)
    return rows
