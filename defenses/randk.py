"""Random-k sparsification, with memory of what was not sent or unbiased.

Stich, Cordonnier, Jaggi 2018, arXiv:1809.07599, section 2 (rand_k, and the memory of Algorithm 1). The
coordinates are each client's own secret draw, unlike those of `subspace`; whoever sees a message still reads
them off its zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.feedback import with_feedback


@dataclass(frozen=True)
class RandK(Defense):
    """Send only k = max(1, round(fraction · D)) random entries of each update, other ones every time.

    fraction: in (0, 1]. error_feedback: what a client did not send is added to its row the next time it takes
    part; this keeps D numbers a client. unbiased: scale what is sent by D/k instead, only without error
    feedback. Guaranteed of the row v that is compressed, over the draw: at most k entries are not zero; E
    C(v) = (k/D) v and E ‖v − C(v)‖² = (1 − k/D) ‖v‖², or, unbiased, E C(v) = v and E ‖v − C(v)‖² = (D/k − 1)
    ‖v‖². Without error feedback no row gets longer, or D/k times as long where unbiased. No differential
    privacy: every view's ε stays infinite.
    """

    name: ClassVar[str] = "randk"
    fraction: float = 0.1
    error_feedback: bool = True
    unbiased: bool = False

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "fraction", "in (0, 1]", self.fraction)
        if self.unbiased and self.error_feedback:
            raise InputError("unbiased must be false with error_feedback, got True")

    def bound(self, sensitivity: float | None) -> float | None:
        """Where D is not known, D/k ≤ 1.5 / fraction serves: rounding loses at most a third of it."""
        if self.error_feedback or sensitivity is None:
            return None
        widest = 1.0 if self.fraction == 1 else 1.5 / self.fraction
        return sensitivity * widest if self.unbiased else sensitivity

    def bound_in(self, sensitivity: float | None, ctx: RoundContext) -> float | None:
        if not self.unbiased or sensitivity is None or ctx.local is None:
            return self.bound(sensitivity)
        return sensitivity * self._scale(ctx.local.layout.size)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        if not self.error_feedback:
            return self.compress(rows, ctx)
        return with_feedback(rows, ctx, lambda wanted: self.compress(wanted, ctx))

    def compress(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """C(v) of every row."""
        size = rows.shape[1]
        index = torch.empty(len(rows), self._kept(size), dtype=torch.long)
        for row, c in zip(index, ctx.clients, strict=True):
            row.copy_(torch.randperm(size, generator=ctx.client_rng(c))[: len(row)])
        index = index.to(rows.device)
        values = rows.gather(1, index) * (self._scale(size) if self.unbiased else 1.0)
        return torch.zeros_like(rows).scatter(1, index, values)

    def _kept(self, size: int) -> int:
        return max(1, round(self.fraction * size))

    def _scale(self, size: int) -> float:
        return size / self._kept(size)
