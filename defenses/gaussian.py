"""The Gaussian mechanism on updates, at each client or once at the server.

Client level as in McMahan et al. 2018, arXiv:1710.06963, Algorithm 1, with the average's denominator
held fixed. Two clients' data sets are neighbours when one client's contribution is replaced by zero
("zero-out" adjacency; Kairouz et al. 2021, arXiv:2103.00039, section 2), so the sensitivity of a row is
the clip before it, and that of the weighted mean is the clip times the largest weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.types import PrivacyEvent

PLACEMENTS = ("client", "server")


@dataclass(frozen=True)
class Gaussian(Defense):
    """Add N(0, (noise_multiplier · sensitivity)²) to every coordinate.

    noise_multiplier: σ ≥ 0, a ratio. placement "client": each client noises its own message, which
    protects every view; "server": the trusted server noises the aggregate before release, which leaves
    whoever sees messages, or their sum, at ε = ∞.
    """

    name: ClassVar[str] = "gaussian"
    noise_multiplier: float = 1.0
    placement: str = "server"

    def __post_init__(self) -> None:
        sigma = self.noise_multiplier
        require(isfinite(sigma) and sigma >= 0, "noise_multiplier", "a finite number >= 0", sigma)
        require(self.placement in PLACEMENTS, "placement", f"one of {PLACEMENTS}", self.placement)

    @property
    def acts_on_rows(self) -> bool:
        return self.placement == "client"

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        if sensitivity is None:
            raise InputError(
                "gaussian must come after a clip, whose norm is its sensitivity: "
                "for example clip:norm=0.5 before it; got none"
            )

    def bound(self, sensitivity: float | None) -> float | None:
        return None if self.placement == "client" else sensitivity

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        if self.placement == "server" or self.noise_multiplier == 0:
            return rows
        std = self.noise_multiplier * _sensitivity(ctx)
        noise = [torch.randn(rows.shape[1], generator=ctx.client_rng(c)) for c in ctx.clients]
        return rows + std * torch.stack(noise).to(rows)

    def server(self, aggregate: Tensor, ctx: RoundContext) -> Tensor:
        if self.placement == "client" or self.noise_multiplier == 0:
            return aggregate
        std = self.noise_multiplier * _sensitivity(ctx) * float(ctx.weights.max())
        return aggregate + std * torch.randn(aggregate.shape, generator=ctx.server_rng()).to(aggregate)

    def privacy(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        from dp_accounting import GaussianDpEvent

        if self.noise_multiplier == 0:
            return ()
        sigma = self.noise_multiplier
        if self.placement == "server":
            return (PrivacyEvent(GaussianDpEvent(sigma), "aggregate"),)
        summed = sigma * float(ctx.weights.norm() / ctx.weights.max())
        return (
            PrivacyEvent(GaussianDpEvent(sigma), "message"),
            PrivacyEvent(GaussianDpEvent(summed), "sum"),
        )


def _sensitivity(ctx: RoundContext) -> float:
    assert ctx.sensitivity is not None, "DefenseStack.check refuses noise without a clip"
    return ctx.sensitivity
