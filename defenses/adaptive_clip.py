"""Clipping to a quantile of the updates' lengths, estimated privately from round to round.

Andrew, Thakkar, McMahan, Ramaswamy 2021, arXiv:1905.03871, Algorithm 1: each client sends, beside its clipped
update, whether it was at most C long; the server adds N(0, σ_b²) to the sum of these bits b_k − 1/2, so
that b̄ is a private estimate of the share below C, and sets C ← C · exp(−η_C (b̄ − γ)). A bit moves the sum
by 1/2, so the estimate is a Gaussian mechanism with noise multiplier 2 σ_b; it is a release of its own,
which composes with the noise on the updates. (The paper splits one noise multiplier z between the two
instead: its z is (z_Δ⁻² + (2 σ_b)⁻²)^(−1/2), which is what composing gives.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import require
from fltoolkit.events import central_gaussian
from fltoolkit.types import PrivacyEvent


@dataclass(frozen=True)
class AdaptiveClip(Defense):
    """Clip every update to C, which follows the given quantile of the updates' norms.

    norm: C of the first round, > 0. quantile: γ in [0, 1]. rate: η_C > 0. bit_noise: σ_b ≥ 0 on the sum of
    the bits, added at the server; the paper takes a twentieth of the cohort. With bit_noise = 0 the
    norm is not private: every view's ε is infinite.
    """

    name: ClassVar[str] = "adaptive-clip"
    norm: float = 1.0
    quantile: float = 0.5
    rate: float = 0.2
    bit_noise: float = 1.0

    def __post_init__(self) -> None:
        require(isfinite(self.norm) and self.norm > 0, "norm", "a finite number > 0", self.norm)
        require(0 <= self.quantile <= 1, "quantile", "between 0 and 1", self.quantile)
        require(isfinite(self.rate) and self.rate > 0, "rate", "a finite number > 0", self.rate)
        good = isfinite(self.bit_noise) and self.bit_noise >= 0
        require(good, "bit_noise", "a finite number >= 0", self.bit_noise)

    def bound(self, sensitivity: float | None) -> float:
        return self.norm

    def bound_in(self, sensitivity: float | None, ctx: RoundContext) -> float:
        return self.norm_in(ctx)

    def norm_in(self, ctx: RoundContext) -> float:
        """C of this round."""
        kept = ctx.recall("norm")
        return self.norm if kept is None else float(kept)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        c = self.norm_in(ctx)
        norms = vector_norm(rows.double(), dim=1, keepdim=True)
        below = (norms <= c).sum().double().cpu()
        before = ctx.recall("below")
        ctx.remember(below if before is None else before + below, "below")
        return rows * (c / norms.to(rows.dtype).clamp_min(c))

    def server(self, aggregate: Tensor, ctx: RoundContext) -> Tensor:
        expected = self._cohort(ctx)
        below = ctx.recall("below")
        centred = (0.0 if below is None else float(below)) - len(ctx.clients) / 2
        noise = float(torch.randn((), generator=ctx.server_rng(), dtype=torch.float64))
        share = min(1.0, max(0.0, (centred + self.bit_noise * noise) / expected + 0.5))
        ctx.remember(torch.tensor(self.norm_in(ctx) * exp(-self.rate * (share - self.quantile))), "norm")
        ctx.remember(torch.zeros((), dtype=torch.float64), "below")
        return aggregate

    @staticmethod
    def _cohort(ctx: RoundContext) -> float:
        """The public number that the bits are divided by."""
        if ctx.sampling.kind == "poisson":
            return ctx.sampling.rate * ctx.sampling.population
        return float(len(ctx.clients))

    def privacy(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        return central_gaussian(2 * self.bit_noise, ctx, "norms") if self.bit_noise else ()
