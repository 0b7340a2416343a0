"""The Gaussian mechanism in closed form (Balle and Wang 2018, arXiv:1805.06530, theorem 8).

μ is the distance between the two means in units of the noise's standard deviation. T releases with μ_1 ...
μ_T are together one with μ² = Σ μ_t² (Dong, Roth and Su 2019, arXiv:1905.02383, corollary 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

ROUNDING = 1e-10
"""Relative size by which a root is moved to its safe side."""


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest δ in [0, 1] at ε (any real number) for μ > 0."""
    return float(ndtr(mu / 2 - epsilon / mu) - exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest ε >= 0 at δ in (0, 1) for μ >= 0, to 1e-9 of itself and never below it."""
    if mu == 0:
        return 0.0
    tail = -float(ndtri(min(delta, 0.5)))
    return smallest_epsilon(lambda e: delta_of(mu, e), delta, mu * (mu / 2 + tail))


def smallest_epsilon(profile: Callable[[float], float], delta: float, upper: float) -> float:
    """Where a falling `profile` δ(ε) comes down to `delta`; 0 where it starts below. δ(`upper`) must be <=
    δ."""
    if profile(0.0) <= delta:
        return 0.0

    def excess(e: float) -> float:
        return log(max(profile(e), 1e-300) / delta)

    root = float(brentq(excess, 0.0, upper * 1.001 + 1e-9, xtol=1e-14, rtol=1e-12))
    return root * (1 + ROUNDING)


def success_of(mu: float, prior: float) -> float:
    """The largest probability Φ(Φ⁻¹(κ) + μ) of an event that has probability `prior` κ without the record."""
    return float(ndtr(ndtri(prior) + mu))
