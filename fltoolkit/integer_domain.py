"""From clipped updates to integers whose sum a secure aggregation adds exactly, and back.

The client's and server's steps of Kairouz, Liu and Steinke 2021, arXiv:2102.06387, Algorithms 1 and 2, which
Agarwal, Kairouz and Liu 2021, arXiv:2110.04995, share: divide by a step γ, rotate by a public randomised
Hadamard transform, round each coordinate up or down at random and without bias, again until the norm is
within a bound, add integer noise. The sum of the clients' integers, times γ, rotated back, is the sum of
their updates with noise.

Three choices of this implementation. Nothing is reduced modulo 2^bits: the carrier, a float row or the
secure sum's own words, is wide enough or refuses. γ is a power of two, so that γ times an integer is an
exact float32 below 2^24 γ. Weights must be equal, since a weighted sum of integers has no step.

What is stated for the sum holds for whoever sees the integers' sum, or what follows from it, as the released
aggregate does. A carrier that rounds each client's γ m / K by itself to another fixed point shows whoever
reads its sum a little more; it must add without rounding: its integers per unit must be a multiple of K / γ.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, exp, floor, isfinite, log, log2, sqrt
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.hadamard import random_signs, rotate, unrotate
from fltoolkit.noise import Secure, Source, numpy_generator
from fltoolkit.rng import torch_stream
from fltoolkit.types import PrivacyEvent

TRIES = 1000
"""Roundings before a row is refused; each succeeds with chance at least 1 - β."""

EXACT = {torch.float32: 2**24, torch.float64: 2**53}
"""Below which every integer is a float of the type."""

OFF_GRID = 0.25
"""How far, in steps, a sum may be from an integer before the server refuses it."""


@dataclass(frozen=True)
class Grid:
    """The integers of one round. step: γ, in units of the update. limit: the bound on the L2 norm of a
    client's integers before noise. variance: the parameter σ² or μ of one client's noise, in steps²."""

    step: float
    limit: float
    variance: float


@dataclass(frozen=True)
class IntegerNoise(Defense):
    """Base of the defenses that add integer noise at each client, sized so that the sum has enough.

    noise_multiplier: standard deviation of the noise on the cohort's sum, in units of the clip norm C; each
    of K clients adds noise of standard deviation noise_multiplier · C / √K. clients: that K; None: the
    expected size of the cohort. bits, k_stddevs: the step γ is the smallest power of two with which
    ± k_stddevs standard deviations of a coordinate of the sum fit in 2^bits integers. rotate: whether a
    public rotation makes coordinates alike first. beta: 0 < β < 1, how rare the roundings are that the norm
    bound excludes. secure_rng: noise from the operating system's randomness in place of the seed.

    Every client's integers before noise have an L2 norm of at most `Grid.limit`, whatever the data, and the
    privacy events count on nothing else. Two clients' data sets are neighbours when one client's
    contribution is replaced by zero; that client still adds its noise. Events are for the noise of the
    clients that took part; c of them who tell the server their noise leave that of K - c.
    """

    aliases: ClassVar[Mapping[str, str]] = {"clients": "cohort"}
    smallest_variance: ClassVar[float] = 0.0
    noise_multiplier: float = 1.0
    cohort: int | None = None
    bits: int = 16
    k_stddevs: float = 4.0
    rotate: bool = True
    beta: float = exp(-0.5)
    secure_rng: bool = False

    def __post_init__(self) -> None:
        sigma = self.noise_multiplier
        require(isfinite(sigma) and sigma > 0, "noise_multiplier", "a finite number > 0", sigma)
        require(self.cohort is None or self.cohort >= 1, "clients", ">= 1", self.cohort)
        require(self.bits in range(2, 25), "bits", "an integer from 2 to 24", self.bits)
        good = isfinite(self.k_stddevs) and self.k_stddevs > 0
        require(good, "k_stddevs", "a finite number > 0", self.k_stddevs)
        require(0 < self.beta < 1, "beta", "between 0 and 1", self.beta)

    @abstractmethod
    def draw(self, variance: float, size: int, rng: Source) -> np.ndarray:
        """One client's noise `[size]`, int64."""

    @abstractmethod
    def event(self, grid: Grid, dim: int, terms: int) -> Any:
        """What the sum of `terms` clients' noise guarantees on D = `dim` coordinates."""

    @property
    def wanted_cohort(self) -> int | None:
        return self.cohort

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        name = self.name
        if sensitivity is None:
            raise InputError(
                f"{name} must come after a clip, whose norm is its sensitivity: for example clip:norm=0.5 "
                "before it; got none"
            )
        if None not in (self.cohort, cohort) and self.cohort != cohort:
            raise InputError(f"{name}:clients must equal the round's cohort of {cohort}, got {self.cohort}")

    def bound(self, sensitivity: float | None) -> None:
        return None

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """Rows `[K, D]` -> γ times integers `[K, D]`, rotated, exact in the rows' type."""
        self._refuse_unequal(ctx)
        dim = rows.shape[1]
        if ctx.local is None:
            ctx.remember(torch.tensor(dim), "dim")
        grid, signs = self.grid(ctx, dim), self.signs(ctx, dim)
        most = EXACT.get(rows.dtype, 0)
        out = torch.empty(rows.shape, dtype=rows.dtype)
        for k, client in enumerate(ctx.clients):
            sent = self._message(rows[k].detach().cpu().double(), grid, signs, ctx, client)
            largest = int(np.abs(sent).max(initial=0))
            require(largest < most, f"{self.name}: integers in {rows.dtype}", f"below {most}", largest)
            out[k] = torch.from_numpy(sent * grid.step)
        return out.to(rows.device)

    def _message(
        self, row: Tensor, grid: Grid, signs: Tensor | None, ctx: RoundContext, client: int
    ) -> np.ndarray:
        """One client's integers with noise `[D]`, int64."""
        rng = numpy_generator(ctx.client_rng(client))
        norm = float(row.norm())
        require(isfinite(norm), f"update of client {client}", "finite", norm)
        flat = row * (min(1.0, _clip(ctx) / norm if norm else 1.0) / grid.step)
        if signs is not None:
            flat = rotate(flat[None], signs)[0]
        rounded = conditional_round(flat.numpy(), grid.limit, rng)
        return rounded + self.draw(grid.variance, len(rounded), Secure() if self.secure_rng else rng)

    def server(self, aggregate: Tensor, ctx: RoundContext) -> Tensor:
        """The mean `[D]` of the messages -> the same in the update's own basis.

        It is put back on the grid first, where float or fixed-point means are a little off it, so that what
        is released is a function of the integers' sum and of nothing else.
        """
        self._refuse_unequal(ctx)
        if not ctx.clients:
            return aggregate
        step = self.grid(ctx, len(aggregate)).step / _divisor(ctx)
        total = aggregate.detach().cpu().double() / step
        off = float((total - total.round()).abs().max())
        if not off <= OFF_GRID:
            raise InputError(
                f"{self.name}: the sum must be a multiple of the step, got one {off:.2g} steps off it: a "
                "defense after this one changed the rows or their weights, or bits is too large for the "
                "sum's precision"
            )
        return self.read(total.round()[None] * step, ctx)[0].to(aggregate)

    def read(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """Messages, or their mean, `[n, D]` in the update's own basis, as anybody can compute it."""
        signs = self.signs(ctx, rows.shape[1])
        return rows if signs is None else unrotate(rows.detach().cpu().double(), signs).to(rows)

    def privacy(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        from dp_accounting import NoOpDpEvent

        self._refuse_unequal(ctx)
        if not ctx.clients:
            return tuple(PrivacyEvent(NoOpDpEvent(), view) for view in ("message", "sum"))
        dim = self._dim(ctx)
        grid = self.grid(ctx, dim)
        return (
            PrivacyEvent(self.event(grid, dim, 1), "message"),
            PrivacyEvent(self.event(grid, dim, len(ctx.clients)), "sum"),
        )

    def grid(self, ctx: RoundContext, dim: int) -> Grid:
        """The round's integers: public, the same for every client."""
        norm, cohort = _clip(ctx), self._share(ctx)
        step = self._step(norm, cohort, dim)
        limit = norm_bound(norm / step, dim, self.beta)
        variance = (self.noise_multiplier * norm / step) ** 2 / cohort
        least = self.smallest_variance
        ok = limit < 2**31 and variance >= least
        require(ok, f"{self.name}:bits", f"such that σ² of a client's noise is >= {least} steps²", self.bits)
        return Grid(step, limit, variance)

    def _step(self, norm: float, cohort: float, dim: int) -> float:
        """γ with 2 k σ̂ ≤ 2^bits γ, where σ̂² = signal + noise + K γ² / 4 is the variance of a coordinate of
        the sum: (K C)² / D of the signal where all clients agree and the rotation spreads it; without one,
        a single coordinate may hold all of K C."""
        k = self.k_stddevs
        signal = (cohort * norm) ** 2 / (dim if self.rotate else k**2)
        part = 4 * k**2 / 4.0**self.bits
        require(part * cohort / 4 < 1, f"{self.name}:bits", f"enough for {cohort:g} clients", self.bits)
        squared = part * (signal + (self.noise_multiplier * norm) ** 2) / (1 - part * cohort / 4)
        return 2.0 ** ceil(log2(squared) / 2)

    def signs(self, ctx: RoundContext, dim: int) -> Tensor | None:
        """The public signs `[D]` of this round's rotation, None where there is none."""
        if not self.rotate:
            return None
        rng = torch_stream(ctx.seed, "round", ctx.round, "public", "defense", ctx.name)
        return random_signs(dim, rng).double()

    def _share(self, ctx: RoundContext) -> float:
        """K, by which the noise on the sum is shared. A context may hold a part of the cohort only."""
        if self.cohort is not None:
            return self.cohort
        return ctx.sampling.rate * ctx.sampling.population or len(ctx.clients)

    def _dim(self, ctx: RoundContext) -> int:
        if ctx.local is not None:
            return ctx.local.layout.size
        known = ctx.recall("dim")
        if known is None:
            raise InputError(f"{self.name} needs the number of parameters to state its ε: a round's `local`")
        return int(known)

    def _refuse_unequal(self, ctx: RoundContext) -> None:
        w = ctx.weights
        if len(w) and not torch.allclose(w, w[:1].expand_as(w), rtol=1e-6, atol=0):
            raise InputError(
                f"{self.name} adds integers, so all clients must have equal weights, that is as many "
                f"examples each (Poisson sampling counts all alike); got weights from {float(w.min()):g} to "
                f"{float(w.max()):g}"
            )


def norm_bound(norm: float, dim: int, beta: float) -> float:
    """The L2 norm that the rounding of a vector `[D]` of L2 norm ≤ `norm` keeps with a chance of at least
    1 - β: arXiv:2102.06387, Algorithm 1 (the first holds for every rounding)."""
    always = norm + sqrt(dim)
    mostly = norm**2 + dim / 4 + sqrt(2 * log(1 / beta)) * (norm + sqrt(dim) / 2)
    return min(always, sqrt(mostly))


def conditional_round(values: np.ndarray, limit: float, rng: np.random.Generator) -> np.ndarray:
    """Each value to one of the two integers around it, unbiased, as often as it takes until the L2 norm is
    ≤ limit < 2^31; int64. The condition is checked in integers."""
    low = np.floor(values)
    part, whole, most = values - low, low.astype(np.int64), floor(limit**2)
    for _ in range(TRIES):
        rounded = whole + (rng.random(len(values)) < part)
        if int(np.dot(rounded, rounded)) <= most:
            return rounded
    norm = float(np.linalg.norm(values))
    raise InputError(f"a rounding of norm <= {limit:g} must exist, got a row of norm {norm:g}")


def _clip(ctx: RoundContext) -> float:
    assert ctx.sensitivity is not None, "DefenseStack.check refuses noise without a clip"
    return ctx.sensitivity


def _divisor(ctx: RoundContext) -> float:
    """What the sum of the rows was divided by: the cohort's size, or its expectation where it is random."""
    how = ctx.sampling
    return how.rate * how.population if how.kind == "poisson" else len(ctx.clients)
