"""The distributed discrete Gaussian mechanism.

Kairouz, Liu and Steinke 2021, arXiv:2102.06387, Algorithms 1 and 2 (see `fltoolkit.integer_domain`), with the
exact sampler of Canonne, Kamath and Steinke 2020, arXiv:2004.00010 (see `fltoolkit.noise`).

What is guaranteed, in integers: γ is the step, Δ the bound on a client's rounded norm, σ² the parameter of
one client's noise. A client's message satisfies ρ-zCDP with ρ = Δ² / (2 σ²) (arXiv:2004.00010, Theorem 14).
The sum of n messages satisfies ½ ε² -zCDP for σ ≥ 1/2, with

    ε = min{ √(Δ² / (n σ²) + ½ τ D),  Δ / (√n σ) + τ √D },   τ = 10 Σ_{k=1}^{n-1} exp(-2 π² σ² k / (k + 1)),

since a sum of discrete Gaussians is not one, but nearly (arXiv:2102.06387, section 3). Samples and sums are
integers: no floating-point number reaches the server, and attacks on the low bits find nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, pi, sqrt
from typing import Any, ClassVar

import numpy as np

from fltoolkit.integer_domain import Grid, IntegerNoise
from fltoolkit.noise import Source, discrete_gaussian


@dataclass(frozen=True)
class DiscreteGaussian(IntegerNoise):
    """Round to integers, add N_Z(0, σ²) with (γ σ)² = (noise_multiplier · C)² / K at each of K clients.

    Rows leave as γ times integers, in rotated coordinates; the server puts the mean back. It protects the
    sum of messages, which a secure sum must be the only thing to show, with about noise_multiplier, and a
    single message with noise_multiplier / √K. Weights must be equal. The options are those of
    `fltoolkit.integer_domain.IntegerNoise`.
    """

    name: ClassVar[str] = "discrete-gaussian"
    smallest_variance: ClassVar[float] = 0.25

    def draw(self, variance: float, size: int, rng: Source) -> np.ndarray:
        return discrete_gaussian(variance, size, rng)

    def event(self, grid: Grid, dim: int, terms: int) -> Any:
        from dp_accounting import ZCDpEvent

        return ZCDpEvent(sum_epsilon(grid.limit, grid.variance, dim, terms) ** 2 / 2)


def sum_epsilon(sensitivity: float, variance: float, dim: int, terms: int) -> float:
    """ε such that the sum of `terms` discrete Gaussians on D coordinates gives ½ ε² -zCDP."""
    tau = 10 * sum(exp(-2 * pi**2 * variance * k / (k + 1)) for k in range(1, terms))
    plain = sensitivity / sqrt(terms * variance)
    return min(sqrt(plain**2 + tau * dim / 2), plain + tau * sqrt(dim))
