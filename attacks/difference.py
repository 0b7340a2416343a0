"""The difference of two sums: one client takes part in the first round and not in the second.

A server that repeats a model and leaves its target out of the second cohort, or waits until it is gone,
subtracts one sum from the other. Each round by itself is a proper secure sum over more clients than the
threshold. The simplest case of `disaggregation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fltoolkit.exposure import Exposing
from fltoolkit.several_rounds import PatientServer, single_out
from fltoolkit.threat import ThreatModel
from fltoolkit.types import Observation


class SubtractingServer(PatientServer):
    """The patient server with two rounds, of all clients and of all but the target."""

    def cohorts(self, clients: int) -> tuple[tuple[int, ...], ...]:
        everybody = tuple(range(clients))
        return (everybody, everybody[1:]) if clients > 1 else (everybody,)


@dataclass(frozen=True)
class Difference(Exposing):
    """Subtract the sum of a round without the target from that of one with it, and invert the difference."""

    name: ClassVar[str] = "difference"

    def threat(self) -> ThreatModel:
        return SubtractingServer()

    def expose(self, observation: Observation) -> tuple[Observation | None, str]:
        return single_out(observation)


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("difference")
