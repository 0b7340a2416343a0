"""Pairs of distributions that dominate one step of a mechanism, and their privacy profiles δ(ε).

With clip norm 1, noise of standard deviation s and sampling rate q, let P = (1-q) N(0, s²) + q N(1, s²) and
P' the same with -1 for 1.

- "one way": P against N(0, s²) and N(0, s²) against P, the same way round in every step. This is a Poisson
  sample whose neighbours differ by one record more or less (Zhu, Dong and Wang 2022, arXiv:2106.08567,
  theorem 11).
- "two-sided": P against P', a Poisson sample in which a record is replaced (Lebeda et al. 2024,
  arXiv:2405.20769).
- "either way": at each ε the larger of the two profiles of "one way". With all lengths doubled this is a
  sample of fixed size in which a record is replaced (Zhu, Dong and Wang, theorem 11). Others' contributions
  decide which way round a step is, so an adversary may turn it in the middle, and the worse of two
  compositions that never turn is no bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, log1p, sqrt

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri

ONE_WAY, TWO_SIDED, EITHER_WAY = "one way", "two-sided", "either way"


@dataclass(frozen=True)
class Pair:
    """One step. noise: s > 0, relative to a shift of 1; rate: q in (0, 1]. At rate 1 it is plain Gaussian."""

    kind: str
    noise: float
    rate: float = 1.0

    @property
    def mu(self) -> float:
        """The distance of the two Gaussians in standard deviations, for a pair "one way" at rate 1."""
        assert (self.kind, self.rate) == (ONE_WAY, 1), "`events.step` makes all plain Gaussians one way"
        return 1 / self.noise

    @property
    def unsampled_mu(self) -> float:
        """`mu` as it would be at rate 1, where the loss is never smaller."""
        return (2 if self.kind == TWO_SIDED else 1) / self.noise

    def deltas(self, way: int, epsilons: np.ndarray) -> np.ndarray:
        """δ `[n]` in [0, 1] at `epsilons [n]`, for `way` 0 or 1 in `range(ways)`."""
        return np.clip(_PROFILES[self.kind][way](epsilons, self.noise, self.rate), 0, 1)

    @property
    def ways(self) -> int:
        """How many profiles must each be composed."""
        return len(_PROFILES[self.kind])

    def span(self, way: int, tail: float) -> tuple[float, float]:
        """The smallest and largest privacy loss but for events of probability `tail`."""
        reach = 1 - self.noise * float(ndtri(tail))
        top = self._loss(reach)
        if self.kind != ONE_WAY:
            return -top, top
        floor = max(self._loss(1 - reach), log1p(-self.rate) if self.rate < 1 else -inf)
        return (floor, top) if way == 0 else (-top, -floor)

    def _loss(self, x: float) -> float:
        def log_mixture(sign: int) -> float:
            away = log(self.rate) + (2 * sign * x - 1) / (2 * self.noise**2)
            stays = log1p(-self.rate) if self.rate < 1 else -inf
            return float(np.logaddexp(stays, away))

        return log_mixture(1) - (log_mixture(-1) if self.kind == TWO_SIDED else 0.0)


def gaussian(mu: float) -> Pair:
    """All of a Gaussian mechanism without sampling, or of many of them."""
    return Pair(ONE_WAY, 1 / mu)


def merged(mus: list[float]) -> float:
    """The μ of all of `mus` together."""
    return sqrt(sum(m * m for m in mus))


def _removed(e: np.ndarray, s: float, q: float) -> np.ndarray:
    """P against N(0, s²): q times the Gaussian's δ at ln(1 + (e^ε - 1) / q)."""
    floor = log1p(-q) if q < 1 else -inf
    above = e > floor
    d = -np.expm1(np.where(above, floor, e)) if q < 1 else np.zeros_like(e)
    u = _unmixed(e[above], q)
    x = s * s * u + 0.5
    d[above] = q * (ndtr((1 - x) / s) - np.exp(u + log_ndtr(-x / s)))
    return d


def _added(e: np.ndarray, s: float, q: float) -> np.ndarray:
    """N(0, s²) against P."""
    below = e < (-log1p(-q) if q < 1 else inf)
    d = np.zeros_like(e)
    x = s * s * _unmixed(-e[below], q) + 0.5
    shifted = q * np.exp(e[below] + log_ndtr((x - 1) / s))
    d[below] = (q - (1 - q) * np.expm1(e[below])) * ndtr(x / s) - shifted
    return d


def _unmixed(e: np.ndarray, q: float) -> np.ndarray:
    """ln(1 + (e^ε - 1) / q), without overflow and exact about ε = 0."""
    if q == 1:
        return e
    small = np.log1p(np.maximum(np.expm1(np.minimum(e, 1)) / q, -1 + 2e-16))
    return np.where(e < 1, small, e + np.log1p(-(1 - q) * np.exp(-np.maximum(e, 1))) - log(q))


def _either(e: np.ndarray, s: float, q: float) -> np.ndarray:
    return np.maximum(_removed(e, s, q), _added(e, s, q))


def _two_sided(e: np.ndarray, s: float, q: float) -> np.ndarray:
    """P against P'. The loss is ε at x / s² = ε/2 + arsinh((1-q)/q · e^(1 / 2s²) · sinh(ε/2))."""
    half = np.maximum(np.abs(e) / 2, 1e-300)
    w = 1 / (2 * s * s) + (log1p(-q) - log(q) if q < 1 else -inf)
    w = w + half + np.log(-np.expm1(-2 * half)) - log(2)
    arsinh = np.logaddexp(w, np.logaddexp(0, 2 * w) / 2)
    x = s * (e / 2 + np.sign(e) * arsinh)
    stays = ndtr(-x) - np.exp(e + log_ndtr(-x))
    return (1 - q) * stays + q * (ndtr(1 / s - x) - np.exp(e + log_ndtr(-x - 1 / s)))


_PROFILES = {ONE_WAY: (_removed, _added), TWO_SIDED: (_two_sided,), EITHER_WAY: (_either,)}
