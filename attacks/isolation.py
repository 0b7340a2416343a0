"""A server that says that all clients but its target dropped out.

Bonawitz et al. 2017, ePrint 2017/281, section 6: the sum over one survivor is that survivor's input, which
is why clients reveal nothing for fewer survivors than the threshold. Where the threshold is low, as in
`secagg:threshold=0.1`, the target's update comes out alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fltoolkit.exposure import Exposing
from fltoolkit.threat import CuriousServer, Public, ThreatModel
from fltoolkit.types import Meddling


class IsolatingServer(CuriousServer):
    """Ignores the masked inputs of everybody but its target."""

    name: ClassVar[str] = "isolating"
    about: ClassVar[str] = "malicious server that says all clients but its target dropped out"

    def meddling(self, params: Tensor, cohort: Sequence[int], public: Public) -> Meddling:
        return Meddling(ignored=frozenset(cohort[1:]))


@dataclass(frozen=True)
class Isolation(Exposing):
    """Claim that everybody else dropped out of the secure sum, and invert what is left."""

    name: ClassVar[str] = "isolation"

    def threat(self) -> ThreatModel:
        return IsolatingServer()


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("isolation")
