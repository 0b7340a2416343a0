"""Stochastic quantisation of updates (QSGD).

Alistarh et al. 2017, arXiv:1610.02132, eq. 3.1 and Lemma 3.1 with the 2-norm; buckets as in its section 4.
For v ≠ 0, Q(v)_i = ‖v‖ sign(v_i) ξ_i, where ξ_i is one of the two multiples of 1/s next to |v_i| / ‖v‖, drawn
so that its mean is just that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import require


@dataclass(frozen=True)
class Quantise(Defense):
    """Round each update's entries at random to whole multiples of its norm / levels, unbiased.

    levels: s ≥ 1. bucket: round in pieces of so many entries, each with a norm of its own; None takes the
    whole row v, of D entries. Guaranteed over the draw: E Q(v) = v and E ‖Q(v) − v‖² ≤ min(D/s², √D/s) ‖v‖²,
    with the bucket's size for D where there is one; always: every entry is a multiple m ‖v‖/s with |m| ≤ s
    and less than ‖v‖/s away from its own, so ‖Q(v)‖ ≤ min(√D, 1 + √D/s) ‖v‖. A row may get that much longer.
    No differential privacy, in spite of the randomness: every view's ε stays infinite.
    """

    name: ClassVar[str] = "quantise"
    levels: int = 4
    bucket: int | None = None

    def __post_init__(self) -> None:
        require(self.levels >= 1, "levels", ">= 1", self.levels)
        require(self.bucket is None or self.bucket >= 1, "bucket", ">= 1", self.bucket)

    def bound(self, sensitivity: float | None) -> float | None:
        """Provable where the size of a bucket is known; without buckets it depends on D, which is not."""
        if sensitivity is None or self.bucket is None:
            return None
        root = sqrt(self.bucket)
        return sensitivity * min(root, 1 + root / self.levels)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        size = rows.shape[1]
        width = min(self.bucket or size, size)
        parts = pad(rows, (0, -size % width)).unflatten(1, (-1, width))
        norms = vector_norm(parts, dim=2, keepdim=True, dtype=torch.float64).to(rows.dtype)
        exact = self.levels * (parts.abs() / norms.clamp_min(torch.finfo(rows.dtype).tiny))
        whole = exact.floor()
        chance = torch.empty(parts.shape)
        for row, c in zip(chance, ctx.clients, strict=True):
            row.uniform_(generator=ctx.client_rng(c))
        whole += chance.to(rows.device) < exact - whole
        return (parts.sign() * norms * (whole / self.levels)).flatten(1)[:, :size]
