"""The matching loss and its gradient as one compiled program, for networks that are bound by overhead.

`torch.compile` fuses the small operations of a stacked double backward, of which a small network has
hundreds. A program is made for one number of rows, which costs some ten seconds once and a few when PyTorch
finds it in its cache on disk; blocks of `BLOCK` rows keep it at one program a search. Convolutions run as
matrix products over unfolded patches there: those have a plain matrix product as derivative, and no loop over
rows in it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn import functional

from fltoolkit.inversion.client import State, Update
from fltoolkit.inversion.distance import Distance
from fltoolkit.inversion.prior import Prior
from fltoolkit.types import Layout

BLOCK = 4
"""Rows of one program: what is left of a search at its end should not drag empty rows along."""
PROGRAMS = 512
"""Programs that a process may make: each search has its own, and past its limit PyTorch stops compiling."""

Decode = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
Evaluation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, State], tuple[Tensor, Tensor]]
"""`(z [S, n], params [S, D], target [S, D], owner [S], labels [S, N] or None, buffers) -> (loss,
gradient)`"""


class Unfolded(nn.Conv2d):
    """A convolution as a matrix product over patches; the same numbers up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        size, step, apart, pad = self.kernel_size, self.stride[0], self.dilation[0], self.padding
        assert not isinstance(pad, str)
        rows = (x.shape[-2] + 2 * pad[0] - apart * (size[0] - 1) - 1) // step + 1
        patches = functional.unfold(x, size, self.dilation, pad, self.stride)
        out = (self.weight.flatten(1) @ patches).unflatten(-1, (rows, -1))
        return out if self.bias is None else out + self.bias[:, None, None]


def unfolded(model: nn.Module) -> nn.Module:
    """A copy of `model` whose plain convolutions run as `Unfolded`; parameters keep their names."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
        if plain and not isinstance(layer.padding, str):
            layer.__class__ = Unfolded
    return model


def evaluation(
    update: Update,
    layout: Layout,
    decode: Decode,
    distance: Distance,
    priors: tuple[tuple[float, Prior], ...],
) -> Evaluation:
    """The function that is compiled: every row's loss and gradient, without side effects.

    update: of one guess. decode: rows of guesses -> x `[S, N, ...]` and labels or their distributions.
    """
    stacked = vmap(update)

    def evaluate(
        z: Tensor, params: Tensor, target: Tensor, owner: Tensor, labels: Tensor | None, buffers: State
    ) -> tuple[Tensor, Tensor]:
        def sent(guess: Tensor) -> tuple[Tensor, ...]:
            x, y = decode(guess, labels)
            found = stacked(layout.unflatten(params), buffers, x, y)
            return tuple(found[n] for n in layout.names)

        def penalty(guess: Tensor) -> Tensor:
            x, _ = decode(guess, labels)
            return sum((w * p(x, params, owner) for w, p in priors), z.new_zeros(len(z)))

        found, pull = vjp(sent, z)[:2]
        g = torch.cat([f.flatten(1) for f in found], 1)
        loss = distance(g, target)
        (gradient,) = pull(tuple(layout.unflatten(g).values()))
        if priors:
            each, slide = vjp(penalty, z)[:2]
            (slope,) = slide(torch.ones_like(each))
            loss, gradient = loss + each, gradient + slope
        return loss, gradient

    return evaluate


class CompilationError(RuntimeError):
    """There is no program; the message says why."""


class Compiled:
    """An `Evaluation` through `torch.compile`, block by block. seconds: what its first call took, nearly all
    of it compilation. Raises CompilationError where the compiler gives up."""

    def __init__(self, plain: Evaluation) -> None:
        options: dict[str, Any] = {"max_pointwise_cat_inputs": 1}
        self.program: Evaluation = torch.compile(plain, dynamic=False, options=options)
        self.seconds = 0.0

    def __call__(self, *rows: Any) -> tuple[Tensor, Tensor]:
        """Arguments and result of an `Evaluation`, for any number of rows."""
        if self.seconds:
            return self._blocks(*rows)
        begun = time.perf_counter()
        try:
            with torch._dynamo.config.patch(recompile_limit=PROGRAMS, accumulated_recompile_limit=PROGRAMS):
                found = self._blocks(*rows)
        except Exception as e:  # a compiler raises whatever it likes
            words = str(e).strip().splitlines() or [""]
            raise CompilationError(f"{type(e).__name__}: {words[0]}") from e
        self.seconds = time.perf_counter() - begun
        return found

    def _blocks(self, *rows: Any) -> tuple[Tensor, Tensor]:
        count = len(rows[0])
        parts = [self.program(*(_block(r, i) for r in rows)) for i in range(0, count, BLOCK)]
        losses, gradients = zip(*parts, strict=True)
        return torch.cat(losses)[:count], torch.cat(gradients)[:count]


def _block(rows: Any, first: int) -> Any:
    """BLOCK rows from `first` on; past the end the last one again."""
    if rows is None:
        return None
    if isinstance(rows, Mapping):
        return {n: _block(r, first) for n, r in rows.items()}
    part = rows[first : first + BLOCK]
    missing = BLOCK - len(part)
    return part if missing == 0 else torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
