"""T equal steps of the Gaussian mechanism, described and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite

from fltoolkit.accounting.accountants import ACCOUNTANTS
from fltoolkit.accounting.events import ADD_REMOVE, ADJACENCIES, REPLACE_ONE, ZERO_OUT, step
from fltoolkit.accounting.losses import Spent
from fltoolkit.errors import InputError, require

SAMPLINGS = ("poisson", "fixed", "full")
WHOLE = 1e-3
"""How far from a whole number the size of a cohort, N q, may be."""


@dataclass(frozen=True)
class Setting:
    """The arguments of `gaussian_epsilon` and `gaussian_sigma` but σ and ε. Raises InputError where they are
    outside their ranges."""

    sampling_rate: float
    steps: int
    delta: float
    accountant: str = "pld"
    adjacency: str = ADD_REMOVE
    sampling: str = "poisson"
    population: int | None = None

    def __post_init__(self) -> None:
        q, size = self.sampling_rate, self.population
        require(0 < q <= 1, "sampling_rate", "above 0 and at most 1", q)
        require(self.steps >= 1, "steps", ">= 1", self.steps)
        require(0 < self.delta < 1, "delta", "between 0 and 1", self.delta)
        require(self.accountant in ACCOUNTANTS, "accountant", f"one of {tuple(ACCOUNTANTS)}", self.accountant)
        require(self.adjacency in ADJACENCIES, "adjacency", f"one of {ADJACENCIES}", self.adjacency)
        require(self.sampling in SAMPLINGS, "sampling", f"one of {SAMPLINGS}", self.sampling)
        require(size is None or size >= 1, "population", ">= 1", size)
        require(self.sampling != "full" or q == 1, "sampling_rate", "1 where sampling is full", q)
        if self.sampling == "fixed":
            if size is None:
                raise InputError("population must be given where sampling is fixed, got None")
            near = abs(size * q - self.cohort) <= WHOLE and self.cohort >= 1
            expected = f"a whole number m of records over the population {size} where sampling is fixed"
            require(near, "sampling_rate", expected, q)

    @property
    def cohort(self) -> int:
        """m, the records of a sample of fixed size."""
        return round((self.population or 0) * self.sampling_rate)

    @property
    def rate(self) -> float:
        """q, exactly m / N where a sample has a fixed size."""
        return self.cohort / (self.population or 1) if self.sampling == "fixed" else self.sampling_rate

    def spent(self, sigma: float) -> list[Spent]:
        """The alternative guarantees."""
        ways = [self.adjacency]
        if self.sampling == "fixed" and self.rate < 1 and self.adjacency == ZERO_OUT:
            ways.append(REPLACE_ONE)
        return [{step(sigma, self.rate, self.sampling, way): self.steps} for way in ways]

    def epsilon(self, sigma: float) -> float:
        """ε at noise multiplier `sigma` > 0."""
        count = ACCOUNTANTS[self.accountant]
        return min(count(spent, self.delta) for spent in self.spent(sigma))

    def check_adjacency(self, name: str, value: Callable[[Setting], float]) -> None:
        """Raise InputError where a sample has a fixed size and neighbours have not, telling the `value`
        called `name` that replaced records give."""
        if self.sampling == "fixed" and self.rate < 1 and self.adjacency == ADD_REMOVE:
            instead = value(replace(self, adjacency=REPLACE_ONE))
            raise InputError(
                "adjacency must be 'replace-one' where sampling is fixed, because all data sets are equally "
                f"large there, got {self.adjacency!r}; with 'replace-one' {name} = {instead:.6g}"
            )


def check_noise(sigma: float) -> None:
    """Raise InputError unless the noise multiplier `sigma` is one."""
    require(isfinite(sigma) and sigma > 0, "noise_multiplier", "a finite number > 0", sigma)
