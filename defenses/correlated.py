"""Noise that is correlated over rounds: DP-FTRL and matrix factorisation.

What training uses of the rounds' means x_1 ... x_T are their prefix sums A x, A the lower-triangular matrix
of ones. Write A = B C. Releasing B (C x + z), z Gaussian, is the Gaussian mechanism for C x, even where each
x_t is chosen after what was released before (Denisov et al. 2022, arXiv:2202.08312, Theorem 2.1), and the
model after round t carries the noise (B z)_t, which a good C makes much smaller than √t independent ones.
Round t adds (B z)_t - (B z)_{t-1}.

- independent: C = I, Gaussian noise of each round by itself.
- tree: C x are the sums over dyadic ranges of rounds that are complete by round T (Kairouz et al. 2021,
  arXiv:2103.00039, Algorithm 1 and appendix B). A prefix adds one range for each binary one of t.
  honaker: each range is estimated from all ranges below it, weighted by precision (Honaker 2015,
  "Efficient use of differentially private binary trees", the estimate from below): variance 1 / (2 - 2^-h)
  in place of 1 for a range of 2^h rounds.
- banded: C = the lower-triangular Toeplitz square root of A, coefficients binom(2k, k) / 4^k (Fichtenberger,
  Henzinger and Upadhyay 2022, arXiv:2202.11205), cut to `bands` diagonals (Choquette-Choo et al. 2023,
  arXiv:2306.08153; this closed form, Kalinin and Lampert 2024, arXiv:2405.13763), scaled so that its first
  column, the longest, has norm 1.

The sensitivity is the largest ‖Σ_{j in S} c_j‖ over the sets S of rounds that one client may take part in: at
most `participations` of them, any two at least `separation` apart. All entries of C are ≥ 0, so no
directions of the client's updates give more. independent, banded: exactly, at S = {1, 1 + s, 1 + 2 s, ...}:
column products fall with later and with more distant columns. tree: a bound, level by level, which
separation 1 attains where every range counts (honaker).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, hypot, isfinite, sqrt
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.noise import normal
from fltoolkit.rng import torch_stream
from fltoolkit.types import PrivacyEvent

KINDS = ("tree", "banded", "independent")
MOST_ROUNDS = 2048
"""C and the noise's coefficients are kept as dense matrices of about 2 T x T."""


@dataclass(frozen=True)
class Correlated(Defense):
    """The server adds to the mean of round t noise that largely cancels in the sum over rounds.

    noise_multiplier: σ ≥ 0 of the whole run: all of its `rounds` rounds together are one Gaussian mechanism
    of that ratio of noise to sensitivity; a run that stops early has spent less. kind: "tree", "banded" or
    "independent". rounds: T, which must be known. bands: b diagonals. participations: the most rounds that
    one client takes part in, None: any number; separation: the least number of rounds from one to the next.
    A cohort that breaks either is refused, in the round in which it does. honaker: see the module.

    Adjacency: one client's contributions are all replaced by zero. Protects whoever sees aggregates only.
    Means are scaled by the round's clip and largest weight first, both public, so they may change from round
    to round; noise then cancels less well. Noise of earlier rounds is drawn again from their named streams:
    nothing is stored but who took part when, and one round costs up to t draws, or 2 t for the tree. No
    secure source can do that. Normals are float32 from a seeded generator, see `fltoolkit.noise`.
    """

    name: ClassVar[str] = "correlated"
    noise_multiplier: float = 1.0
    kind: str = "banded"
    rounds: int = 100
    bands: int = 16
    participations: int | None = None
    separation: int = 1
    honaker: bool = True

    def __post_init__(self) -> None:
        sigma, k = self.noise_multiplier, self.participations
        require(isfinite(sigma) and sigma >= 0, "noise_multiplier", "a finite number >= 0", sigma)
        require(self.kind in KINDS, "kind", f"one of {KINDS}", self.kind)
        require(1 <= self.rounds <= MOST_ROUNDS, "rounds", f"from 1 to {MOST_ROUNDS}", self.rounds)
        require(self.bands >= 1, "bands", ">= 1", self.bands)
        require(k is None or k >= 1, "participations", ">= 1", k)
        require(self.separation >= 1, "separation", ">= 1", self.separation)

    @property
    def noises_the_sum(self) -> bool:
        return True

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        if sensitivity is None:
            raise InputError(
                "correlated must come after a clip, whose norm is its sensitivity: "
                "for example clip:norm=0.5 before it; got none"
            )

    def server(self, aggregate: Tensor, ctx: RoundContext) -> Tensor:
        self._refuse_late(ctx.round)
        self._attend(ctx)
        if self.noise_multiplier == 0:
            return aggregate
        assert ctx.sensitivity is not None, "DefenseStack.check refuses noise without a clip"
        std = self.noise_multiplier * self.sensitivity(self.rounds) * ctx.sensitivity * ctx.largest_weight
        noise = torch.zeros(aggregate.shape, dtype=torch.float64)
        for coefficient, (number, level) in self._terms(ctx.round):
            noise += coefficient * self._normal(aggregate.shape, ctx, number, level)
        return aggregate + (std * noise).to(aggregate)

    def noise_std(self, number: int) -> float:
        """The standard deviation of what round `number` adds to a coordinate of the mean, in units of the
        clip norm times the largest weight."""
        spread = hypot(*(c for c, _ in self._terms(number)))
        return self.noise_multiplier * self.sensitivity(self.rounds) * spread

    def _normal(self, shape: torch.Size, ctx: RoundContext, number: int, level: int) -> Tensor:
        """z of the range of 2^level rounds that ends with round `number`."""
        more = ("level", level) if level else ()
        rng = torch_stream(ctx.seed, "round", number, "server", "defense", ctx.name, *more)
        return normal(shape, rng).double()

    def _terms(self, number: int) -> list[tuple[float, tuple[int, int]]]:
        found = self.factorisation
        row = found.noise[number - 1]
        return [(float(row[i]), found.ends[i]) for i in np.flatnonzero(row)]

    def _refuse_late(self, number: int) -> None:
        if not 1 <= number <= self.rounds:
            raise InputError(
                f"correlated:rounds must be at least the round's number {number}, got {self.rounds}"
            )

    def _attend(self, ctx: RoundContext) -> None:
        """Note who takes part, and refuse who does so too often or too soon."""
        past = ctx.recall("attendance")
        seen = {} if past is None else {c: (n, last) for c, n, last in past.tolist()}
        for c in ctx.clients:
            n, last = seen.get(c, (0, -self.separation))
            if ctx.round - last < self.separation:
                raise InputError(
                    f"correlated:separation must be at most {ctx.round - last}, the rounds from {last} to "
                    f"{ctx.round} of client {c}, got {self.separation}"
                )
            if self.participations is not None and n >= self.participations:
                raise InputError(
                    f"correlated:participations must be at least {n + 1}, which round {ctx.round} makes of "
                    f"client {c}, got {self.participations}"
                )
            seen[c] = (n + 1, ctx.round)
        table = [[c, n, last] for c, (n, last) in sorted(seen.items())]
        ctx.remember(torch.tensor(table, dtype=torch.int64).reshape(-1, 3), "attendance")

    def privacy(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        """Round t's share: after t rounds the sensitivity is that of C's leading t rows and columns, s_t, and
        Gaussian mechanisms compose by squares, so s_t² - s_{t-1}² over (σ s_T)² is what round t adds."""
        from dp_accounting import GaussianDpEvent, NoOpDpEvent

        self._refuse_late(ctx.round)
        if self.noise_multiplier == 0:
            return ()
        grown = self.sensitivity(ctx.round) ** 2 - self.sensitivity(ctx.round - 1) ** 2
        if grown <= 0:
            return (PrivacyEvent(NoOpDpEvent(), "aggregate"),)
        ratio = self.noise_multiplier * self.sensitivity(self.rounds) / sqrt(grown)
        return (PrivacyEvent(GaussianDpEvent(ratio), "aggregate"),)

    @property
    def factorisation(self) -> Factorisation:
        """B and C, as they are used."""
        if self.kind == "tree":
            return tree(self.rounds, self.honaker)
        return toeplitz(self.rounds, self._bands)

    @property
    def _bands(self) -> int:
        return min(self.bands, self.rounds) if self.kind == "banded" else 1

    def sensitivity(self, number: int) -> float:
        """s_t: how far one client can move C x in the first t rounds, in units of one contribution."""
        most = ceil(number / self.separation)
        count = most if self.participations is None else min(most, self.participations)
        if self.kind == "tree":
            return tree_sensitivity(number, count, self.separation, self.honaker)
        return toeplitz_sensitivity(number, self._bands, count, self.separation)


@dataclass(frozen=True)
class Factorisation:
    """encoder: C `[m, T]`, all entries ≥ 0. noise `[T, m]`: what each z counts in round t's noise; its
    running sums are B. ends: of each z, (the last round it covers, its level), which names its stream."""

    encoder: np.ndarray
    noise: np.ndarray
    ends: tuple[tuple[int, int], ...]


def square_root(bands: int) -> np.ndarray:
    """The first coefficients of (1 - x)^(-1/2), binom(2k, k) / 4^k, scaled to norm 1 `[b]`."""
    c = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, bands))])
    return c / np.linalg.norm(c)


@cache
def toeplitz(rounds: int, bands: int) -> Factorisation:
    """C with the square root's first `bands` diagonals; the noise is C^-1 z."""
    c, inverse = square_root(bands), np.zeros(rounds)
    encoder = sum(np.diag(np.full(rounds - k, c[k]), -k) for k in range(bands))
    for t in range(rounds):
        near = min(t, bands - 1)
        inverse[t] = ((t == 0) - c[1 : near + 1] @ inverse[t - near : t][::-1]) / c[0]
    noise = np.zeros((rounds, rounds))
    for t in range(rounds):
        noise[t, : t + 1] = inverse[t::-1]
    return Factorisation(np.asarray(encoder), noise, tuple((t + 1, 0) for t in range(rounds)))


def toeplitz_sensitivity(rounds: int, bands: int, count: int, separation: int) -> float:
    """‖Σ c_j‖ over the `count` earliest columns j that are `separation` apart, in the first `rounds` rows."""
    c, total = square_root(bands), np.zeros(rounds)
    for j in range(0, rounds, separation)[:count]:
        total[j : j + bands] += c[: rounds - j]
    return float(np.linalg.norm(total))


@cache
def tree(rounds: int, honaker: bool) -> Factorisation:
    """C: the sums over the dyadic ranges that end by round T; without honaker only those that a prefix uses,
    the left ones of each pair."""
    levels = range(rounds.bit_length())
    ends = [(e, h) for h in levels for e in range(2**h, rounds + 1, 2**h) if honaker or (e >> h) % 2]
    number = {end: i for i, end in enumerate(ends)}
    encoder, prefix = np.zeros((len(ends), rounds)), np.zeros((rounds + 1, len(ends)))
    for i, (e, h) in enumerate(ends):
        encoder[i, e - 2**h : e] = 1
    for t in range(1, rounds + 1):
        level = (t & -t).bit_length() - 1
        prefix[t] = prefix[t - 2**level]
        for end, weight in _estimate(t, level, honaker):
            prefix[t, number[end]] = weight
    return Factorisation(encoder, np.diff(prefix, axis=0), tuple(ends))


def _estimate(end: int, level: int, honaker: bool) -> list[tuple[tuple[int, int], float]]:
    """The z that estimate one range, with their weights: the range itself, with honaker also those below it.

    A range of level h has variance v_h = 1 / (2 - 2^-h) by its estimate; its own z counts v_h, its two
    halves' estimates 1 - v_h.
    """
    if not honaker or level == 0:
        return [((end, level), 1.0)]
    own = 1 / (2 - 2.0**-level)
    halves = [*_estimate(end - 2 ** (level - 1), level - 1, True), *_estimate(end, level - 1, True)]
    return [((end, level), own), *((e, (1 - own) * w) for e, w in halves)]


def tree_sensitivity(rounds: int, count: int, separation: int, honaker: bool) -> float:
    """A bound on ‖Σ c_j‖ over any `count` columns j that are `separation` apart. Of the `fit` ranges of level
    h that are complete, none holds more than ⌈2^h / separation⌉ of them; the sum of squares is largest where
    ranges are full one after the other."""
    squared = 0.0
    for h in range(rounds.bit_length()):
        complete = rounds >> h
        fit = complete if honaker else (complete + 1) // 2
        most = min(count, ceil(2**h / separation))
        full, rest = divmod(min(count, fit * most), most)
        squared += full * most**2 + rest**2
    return sqrt(squared)
