"""Normalisation: every row gets the same length.

Bu et al. 2023, arXiv:2206.07136 ("Automatic clipping", AUTO-V and AUTO-S, eq. 3 and 4 of section 4): the row
is divided by its own norm, with a stability constant γ that keeps small rows small. The length of an update,
and with it how far a client was from the common model, is hidden; its direction is not. No differential
privacy: every view's ε stays infinite until noise follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor
from torch.linalg import vector_norm

from fltoolkit.defense import Defense, RoundContext, check_level
from fltoolkit.errors import require


@dataclass(frozen=True)
class Normalise(Defense):
    """Scale each row to length norm · ‖row‖ / (‖row‖ + gamma), which is below norm.

    norm: R, > 0. gamma: γ ≥ 0, in the units of the rows; 0 gives every row but zero exactly the length norm.
    A zero row stays zero. level: "client" or "example".
    """

    name: ClassVar[str] = "normalise"
    norm: float = 1.0
    gamma: float = 0.0
    level: str = "client"

    def __post_init__(self) -> None:
        require(isfinite(self.norm) and self.norm > 0, "norm", "a finite number > 0", self.norm)
        require(isfinite(self.gamma) and self.gamma >= 0, "gamma", "a finite number >= 0", self.gamma)
        check_level(self.level)

    def bound(self, sensitivity: float | None) -> float:
        return self.norm

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        norms = vector_norm(rows.double(), dim=1, keepdim=True)
        scale = self.norm / (norms + self.gamma)
        return (rows.double() * scale.where(norms > 0, 0.0)).to(rows)
