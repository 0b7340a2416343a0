"""Clipping layer by layer.

McMahan et al. 2018, arXiv:1710.06963, section 3 ("per-layer clipping"): the part of a row that belongs to one
parameter tensor is clipped on its own, to C_j with Σ C_j² = C², so that one large layer cannot crowd the
others out. No differential privacy: every view's ε stays infinite until noise follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fltoolkit.defense import Defense, RoundContext, check_level
from fltoolkit.errors import InputError, require

SHARES = ("equal", "size")


@dataclass(frozen=True)
class ClipLayers(Defense):
    """Clip each parameter tensor's part of a row to C_j, with Σ C_j² = norm²: every output row's L2 norm is
    ≤ norm.

    norm: C, > 0, in the units of the rows. shares: "equal" (C_j = C / √m over m tensors, as in the paper) or
    "size" (C_j² in proportion to the tensor's size). level: "client" or "example".
    """

    name: ClassVar[str] = "clip-layers"
    norm: float = 1.0
    shares: str = "equal"
    level: str = "client"

    def __post_init__(self) -> None:
        require(isfinite(self.norm) and self.norm > 0, "norm", "a finite number > 0", self.norm)
        require(self.shares in SHARES, "shares", f"one of {SHARES}", self.shares)
        check_level(self.level)

    def bound(self, sensitivity: float | None) -> float:
        return self.norm if sensitivity is None else min(sensitivity, self.norm)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        if ctx.local is None:
            raise InputError("clip-layers must know the model's layers, got a context without a model")
        sizes = ctx.local.layout.sizes
        bounds = self.bounds(sizes)
        parts = []
        for part, c in zip(rows.split(sizes, dim=1), bounds, strict=True):
            norms = vector_norm(part.double(), dim=1, keepdim=True).to(rows.dtype)
            parts.append(part * (c / norms.clamp_min(c)))
        return torch.cat(parts, dim=1)

    def bounds(self, sizes: tuple[int, ...]) -> list[float]:
        """C_j of tensors of these sizes."""
        if self.shares == "equal":
            return [self.norm / sqrt(len(sizes))] * len(sizes)
        return [self.norm * sqrt(s / sum(sizes)) for s in sizes]
