"""L2 clipping of every row.

Abadi et al. 2016, arXiv:1607.00133, section 3.1 (per example); McMahan et al. 2018, arXiv:1710.06963,
section 3 ("flat clipping" of a client's update). Clipping alone bounds one row's influence and gives
no differential privacy: every view's ε stays infinite until noise follows.
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
class Clip(Defense):
    """Scale each row by min(1, norm / ‖row‖₂), so that every output row's L2 norm is ≤ norm.

    norm: the bound C, > 0, in the units of the rows. Rows within the bound come back unchanged. level:
    "client" (updates) or "example" (gradients inside local training).
    """

    name: ClassVar[str] = "clip"
    norm: float = 1.0
    level: str = "client"

    def __post_init__(self) -> None:
        require(isfinite(self.norm) and self.norm > 0, "norm", "a finite number > 0", self.norm)
        check_level(self.level)

    @property
    def flat_norm(self) -> float:
        return self.norm

    def bound(self, sensitivity: float | None) -> float:
        return self.norm if sensitivity is None else min(sensitivity, self.norm)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        norms = vector_norm(rows.double(), dim=1, keepdim=True).to(rows.dtype)
        return rows * (self.norm / norms.clamp_min(self.norm))
