"""The Skellam mechanism.

Agarwal, Kairouz and Liu 2021, arXiv:2110.04995. Its steps are those of the distributed discrete Gaussian (see
`fltoolkit.integer_domain`); its noise is the difference of two Poisson variables, and sums of Skellam
variables are Skellam, so that the sum of n clients' noise of variance μ is exactly one mechanism of variance
n μ. For integer-valued sensitivities Δ₁, Δ₂ it satisfies Rényi differential privacy of every integer order
α > 1 (their theorem for the multi-dimensional mechanism):

    ε(α) ≤ α Δ₂² / (2 μ) + min{ ((2 α - 1) Δ₂² + 6 Δ₁) / (4 μ²),  3 Δ₁ / (2 μ) }.

Δ₂ is the bound on a client's rounded norm, and Δ₁ ≤ min(√D Δ₂, Δ₂²) for integers. Messages and sums are
integers, so no floating-point number reaches the server; but the sampler decides by float64 logarithms, so
its probabilities are right to about 1e-14 relative and not exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from fltoolkit.errors import require
from fltoolkit.integer_domain import Grid, IntegerNoise
from fltoolkit.noise import Source, skellam
from fltoolkit.rdp_event import RdpCurve


@dataclass(frozen=True)
class Skellam(IntegerNoise):
    """Round to integers, add Skellam noise of variance μ with γ² μ = (noise_multiplier · C)² / K at each of
    K clients.

    Rows leave as γ times integers, in rotated coordinates; the server puts the mean back. It protects the
    sum of messages, which a secure sum must be the only thing to show, and a single message with a K-th of
    the variance. Weights must be equal. The options are those of
    `fltoolkit.integer_domain.IntegerNoise`; secure_rng is refused: there is no exact sampler for it here.
    """

    name: ClassVar[str] = "skellam"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.secure_rng, "secure_rng", "false: discrete-gaussian has it", self.secure_rng)

    def draw(self, variance: float, size: int, rng: Source) -> np.ndarray:
        return skellam(variance, size, rng)

    def event(self, grid: Grid, dim: int, terms: int) -> Any:
        l2, mu = grid.limit, terms * grid.variance
        l1 = min(sqrt(dim) * l2, l2**2)
        return RdpCurve.of(lambda order: renyi_bound(order, l1, l2, mu))


def renyi_bound(order: float, l1: float, l2: float, mu: float) -> float:
    """The bound above on the Rényi divergence of integer order α > 1."""
    extra = min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))
    return order * l2**2 / (2 * mu) + extra
