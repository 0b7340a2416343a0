"""Clipping to a quantile of the updates' lengths, estimated privately from round to round.

Andrew, Thakkar, McMahan, Ramaswamy 2021, arXiv:1905.03871, Algorithm 1: each client sends, beside its clipped
update, whether it was at most C long; the server adds N(0, σ_b²) to the sum of these bits b_k − 1/2, so
that b̄ is a private estimate of the share below C, and sets C ← C · exp(−η_C (b̄ − γ)). A bit moves the sum
by 1/2, so the estimate is a Gaussian mechanism with noise multiplier 2 σ_b; it is a release beside the
update, on the same sample, so that both together are one mechanism with the paper's multiplier
z = (z_Δ⁻² + (2 σ_b)⁻²)^(−1/2), and that is what sampling amplifies. Bits are sent as they are:
whoever sees them before the noise, one by one or added up, has ε = ∞.
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
        return self.norm if sensitivity is None else min(sensitivity, self.norm)

    def bound_in(self, sensitivity: float | None, ctx: RoundContext) -> float:
        c = self.norm_in(ctx)
        return c if sensitivity is None else min(sensitivity, c)

    def norm_in(self, ctx: RoundContext) -> float:
        """C of this round."""
        kept = ctx.recall("norm")
        return self.norm if kept is None else float(kept)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        c = self.norm_in(ctx)
        norms = vector_norm(rows.double(), dim=1, keepdim=True)
        bits = (norms[:, 0] <= c).double().cpu()
        told = torch.stack([torch.tensor(ctx.clients, dtype=torch.float64), bits], 1)
        ctx.remember(torch.cat([self._told(ctx), told]), "bits")
        ctx.remember(torch.tensor(ctx.round), "round")
        return rows * (c / norms.to(rows.dtype).clamp_min(c))

    @staticmethod
    def _told(ctx: RoundContext) -> Tensor:
        """Clients and their bits `[n, 2]`, as far as this round's have sent them."""
        kept, number = ctx.recall("bits"), ctx.recall("round")
        if kept is None or number is None or int(number) != ctx.round:
            return torch.empty(0, 2, dtype=torch.float64)
        return kept.cpu()

    def server(self, aggregate: Tensor, ctx: RoundContext) -> Tensor:
        expected = self._cohort(ctx)
        bits = {int(client): bit for client, bit in self._told(ctx).tolist()}
        centred = sum(bits[c] - 0.5 for c in ctx.clients)
        noise = float(torch.randn((), generator=ctx.server_rng(), dtype=torch.float64))
        share = min(1.0, max(0.0, (centred + self.bit_noise * noise) / expected + 0.5))
        ctx.remember(torch.tensor(self.norm_in(ctx) * exp(-self.rate * (share - self.quantile))), "norm")
        ctx.remember(torch.empty(0, 2, dtype=torch.float64), "bits")
        return aggregate

    @staticmethod
    def _cohort(ctx: RoundContext) -> float:
        """The public number that the bits are divided by."""
        if ctx.sampling.kind == "poisson":
            return ctx.sampling.rate * ctx.sampling.population
        return float(len(ctx.clients))

    def privacy(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        from dp_accounting import NonPrivateDpEvent

        open_to = ("message", "sum") if self.bit_noise else ("message", "sum", "aggregate")
        seen = tuple(PrivacyEvent(NonPrivateDpEvent(), view, release="norms") for view in open_to)
        return (*seen, *(central_gaussian(2 * self.bit_noise, ctx, "norms") if self.bit_noise else ()))
