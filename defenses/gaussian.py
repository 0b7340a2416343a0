"""The Gaussian mechanism on updates or on the gradients of single examples.

On clients' updates, as in McMahan et al. 2018, arXiv:1710.06963, Algorithm 1, with the average's denominator
held fixed: at each client, or once at the server. On examples' gradients, as in DP-SGD (Abadi et al. 2016,
arXiv:1607.00133, Algorithm 1): each client adds it to the sum of every local batch. The sensitivity of a
row is the clip before it, and that of the weighted mean is the clip times the largest weight; neighbours
differ in one contribution, replaced by zero, added or removed, as the sampling allows (`fltoolkit.events`).

Floating point: the noise has the finite grid of its format, so the guarantee is that of the real numbers it
stands for (Mironov 2012, doi:10.1145/2382196.2382264). `secure_rng=true` takes the noise from the operating
system's entropy and sums several draws, see `fltoolkit.noise`; runs then do not repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext, check_level
from fltoolkit.errors import InputError, require
from fltoolkit.events import central_gaussian
from fltoolkit.noise import Secure, normal
from fltoolkit.types import PrivacyEvent

PLACEMENTS = ("client", "server")


@dataclass(frozen=True)
class Gaussian(Defense):
    """Add N(0, (noise_multiplier · sensitivity)²) to every coordinate.

    noise_multiplier: σ ≥ 0, a ratio. placement "client": each client noises its own message, which protects
    every view; "server": the trusted server noises the aggregate before release, which leaves whoever sees
    messages, or their sum, at ε = ∞. level "example": DP-SGD, where a client is the server of its own
    examples' gradients. secure_rng: noise from a cryptographic generator. unbounded: accept rows of any
    length; noise_multiplier is then the standard deviation itself, and every ε is ∞.
    """

    name: ClassVar[str] = "gaussian"
    noise_multiplier: float = 1.0
    placement: str = "server"
    level: str = "client"
    secure_rng: bool = False
    unbounded: bool = False

    def __post_init__(self) -> None:
        sigma = self.noise_multiplier
        require(isfinite(sigma) and sigma >= 0, "noise_multiplier", "a finite number >= 0", sigma)
        require(self.placement in PLACEMENTS, "placement", f"one of {PLACEMENTS}", self.placement)
        check_level(self.level)
        good = self.level == "client" or self.placement == "server"
        require(good, "placement", "server at level example: the noise goes on a batch's sum", self.placement)

    @property
    def acts_on_rows(self) -> bool:
        return self.placement == "client"

    @property
    def noises_the_sum(self) -> bool:
        return self.placement == "server" and not self.unbounded

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        if sensitivity is None and not self.unbounded:
            raise InputError(
                "gaussian must come after a clip, whose norm is its sensitivity: "
                "for example clip:norm=0.5 before it; got none (gaussian:unbounded=true adds noise that "
                "promises no ε)"
            )

    def bound(self, sensitivity: float | None) -> float | None:
        return None if self.placement == "client" else sensitivity

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        if self.placement == "server" or self.noise_multiplier == 0:
            return rows
        noise = [self._normal(rows.shape[1:], ctx.client_rng(c)) for c in ctx.clients]
        return rows + self._std(ctx) * torch.stack(noise).to(rows)

    def server(self, aggregate: Tensor, ctx: RoundContext) -> Tensor:
        if self.placement == "client" or self.noise_multiplier == 0:
            return aggregate
        std = self._std(ctx) * ctx.largest_weight
        return aggregate + std * self._normal(aggregate.shape, ctx.server_rng()).to(aggregate)

    def _normal(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return normal(shape, Secure() if self.secure_rng else rng)

    def _std(self, ctx: RoundContext) -> float:
        """Standard deviation on a row's coordinate."""
        if self.unbounded:
            return self.noise_multiplier
        assert ctx.sensitivity is not None, "DefenseStack.check refuses noise without a clip"
        return self.noise_multiplier * ctx.sensitivity

    def privacy(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        from dp_accounting import GaussianDpEvent, NoOpDpEvent

        if self.noise_multiplier == 0 or self.unbounded:
            return ()
        sigma = self.noise_multiplier
        if self.placement == "server":
            return central_gaussian(sigma, ctx)
        if not ctx.clients:
            return tuple(PrivacyEvent(NoOpDpEvent(), view) for view in ("message", "sum"))
        summed = sigma * float(ctx.weights.norm() / ctx.weights.max())
        return (
            PrivacyEvent(GaussianDpEvent(sigma), "message"),
            PrivacyEvent(GaussianDpEvent(summed), "sum"),
        )
