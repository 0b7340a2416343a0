"""What the defenses that mix examples share: labels as distributions over classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fltoolkit.defense import RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.models import evaluating
from fltoolkit.types import Examples


def distributions(defense: str, data: Examples, ctx: RoundContext, classes: int | None) -> Tensor:
    """The labels of `data` as distributions `[N, classes]` in the type of x; kept where they are that
    already.

    classes: their number, by default read off the model's output. Raises InputError, in the name of
    `defense`, where inputs are no real numbers, labels out of range, or the number of classes unknown.
    """
    require(data.x.is_floating_point(), f"inputs of {defense}", "real numbers, such as pixels", data.x.dtype)
    if data.y.is_floating_point():
        return data.y.to(data.x)
    if classes is None:
        if ctx.local is None:
            raise InputError(f"{defense} must know the number of classes, got neither `classes` nor a model")
        with evaluating(ctx.local.model), torch.no_grad():
            classes = ctx.local.model(data.x[:1].to(ctx.local.params)).shape[-1]
    good = data.y.dim() == 1 and 0 <= int(data.y.min()) <= int(data.y.max()) < classes
    expected, got = f"one of 0..{classes - 1} an example", tuple(data.y.unique().tolist())
    require(good, f"labels of {defense}", expected, got)
    return F.one_hot(data.y, classes).to(data.x)
