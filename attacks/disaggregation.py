"""Disaggregation: single updates out of the sums of many rounds.

Lam, Wei, Brooks, Reddi, Mitzenmacher 2021, arXiv:2106.06089: sums over changing cohorts are equations in
the clients' updates, and enough of them have one solution, where updates change little from round to round,
as when the server repeats a model. Who took part is known to the server of a secure sum; where it is
hidden, it is solved for from how often each client took part (`fltoolkit.disaggregation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import numpy as np

from fltoolkit.errors import require
from fltoolkit.exposure import Exposing
from fltoolkit.rng import stream
from fltoolkit.several_rounds import PatientServer, single_out
from fltoolkit.threat import ThreatModel
from fltoolkit.types import Observation


@dataclass(frozen=True)
class Disaggregation(Exposing):
    """Solve the sums of many rounds for one client's update, and invert it.

    rounds: T, over the same model. fraction: the share of the clients that each round samples at random.
    hidden: whether who took part has to be found too, from counts over windows of `window` rounds.
    """

    name: ClassVar[str] = "disaggregation"
    rounds: int = 20
    fraction: float = 0.5
    hidden: bool = False
    window: int = 2

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", ">= 1", self.rounds)
        require(0 < self.fraction <= 1, "fraction", "above 0 and at most 1", self.fraction)
        require(self.window >= 1, "window", ">= 1", self.window)

    def threat(self) -> ThreatModel:
        return SamplingServer(
            window=self.window, hidden=self.hidden, rounds=self.rounds, fraction=self.fraction
        )

    def expose(self, observation: Observation) -> tuple[Observation | None, str]:
        return single_out(observation)


@dataclass(frozen=True)
class SamplingServer(PatientServer):
    """The patient server with cohorts drawn at random; the target is in the first."""

    rounds: int = 20
    fraction: float = 0.5

    def cohorts(self, clients: int) -> tuple[tuple[int, ...], ...]:
        rng = stream(0, "disaggregation", "cohorts", clients)
        size = max(1, ceil(self.fraction * clients))
        others = rng.permutation(np.arange(1, clients))[: size - 1].tolist()
        drawn = [rng.permutation(clients)[:size].tolist() for _ in range(self.rounds - 1)]
        return tuple(tuple(sorted(cohort)) for cohort in ([0, *others], *drawn))


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("disaggregation")
