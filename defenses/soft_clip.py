"""Soft clipping: updates far from the others are damped smoothly instead of cut.

The factor 1 / √(1 + (‖row‖ / norm)²) of pseudo-Huber type: rows well below the norm pass nearly unchanged,
the length of long ones tends to the norm from below, and the map is smooth and keeps the order of lengths,
where a hard clip makes all long rows equally long. Clipping in this smooth form was proposed for federated
averaging against far-off updates. No differential privacy: every view's ε stays infinite until noise
follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fltoolkit.defense import Defense, RoundContext, check_level
from fltoolkit.errors import require


@dataclass(frozen=True)
class SoftClip(Defense):
    """Scale each row by 1 / √(1 + (‖row‖₂ / norm)²), so that every output row's L2 norm is < norm.

    norm: the bound C, > 0, in the units of the rows. Directions and the order of lengths are kept. level:
    "client" or "example".
    """

    name: ClassVar[str] = "soft-clip"
    norm: float = 1.0
    level: str = "client"

    def __post_init__(self) -> None:
        require(isfinite(self.norm) and self.norm > 0, "norm", "a finite number > 0", self.norm)
        check_level(self.level)

    def bound(self, sensitivity: float | None) -> float:
        """s / √(1 + (s / C)²) where the row came in at most s long; C otherwise."""
        if sensitivity is None:
            return self.norm
        return float(sensitivity / (1 + (sensitivity / self.norm) ** 2) ** 0.5)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        norms = vector_norm(rows.double(), dim=1, keepdim=True)
        return (rows.double() * torch.rsqrt(1 + (norms / self.norm).square())).to(rows)
