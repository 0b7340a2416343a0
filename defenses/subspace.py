"""Gradient masking: clients send only the part of an update that lies in a random subspace.

Konečný et al. 2016, arXiv:1610.05492, section 2 (random masks that a seed announces) and section 3 (rotations
by random signs and a Walsh-Hadamard transform before coordinates are dropped). The server announces the
subspace, the same for all clients of a round, so everybody knows it. It therefore has a seed of its own, an
option, instead of a stream under the run's seed, which names everybody's secret noise and can never be
published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import require
from fltoolkit.projection import Projection, subspace

KINDS = ("mask", "rotate")


@dataclass(frozen=True)
class Subspace(Defense):
    """Send only the part of each update in a public random subspace, a new one every round.

    fraction: in (0, 1]; the subspace has d = max(1, round(fraction · D)) dimensions. kind: "mask" (d of the D
    coordinates) or "rotate" (d of the coordinates after a random rotation, and back, so that every entry
    changes). seed: public; with the number of the round it gives the subspace, see `projection`. Guaranteed:
    the output is P Pᵀ row with d orthonormal columns P, so projecting again changes nothing, no row gets
    longer, ‖row − P Pᵀ row‖² = ‖row‖² − ‖P Pᵀ row‖², and over the seed E P Pᵀ = (d/D) I. No differential
    privacy: every view's ε stays infinite.
    """

    name: ClassVar[str] = "subspace"
    fraction: float = 0.1
    kind: str = "mask"
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "fraction", "in (0, 1]", self.fraction)
        require(self.kind in KINDS, "kind", f"one of {KINDS}", self.kind)
        require(self.seed >= 0, "seed", ">= 0", self.seed)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        return self.projection(rows.shape[1], ctx.round)(rows)

    def projection(self, size: int, number: int) -> Projection:
        """P Pᵀ of round `number` on rows of `size` entries, which whoever knows the options can compute."""
        return subspace(size, self.fraction, self.kind == "rotate", self.seed, number)
