"""Projections onto random subspaces that a public seed names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fltoolkit.hadamard import random_signs, rotate, unrotate
from fltoolkit.rng import torch_stream


@dataclass(frozen=True)
class Projection:
    """Rows `[K, size]` -> P Pᵀ rows, linear and symmetric, onto `kept` dimensions: so many coordinates, or,
    if rotated, so many after a randomised Hadamard rotation. seed, number: what names the subspace."""

    size: int
    kept: int
    rotated: bool
    seed: int
    number: int

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Which coordinates are kept `[size]`, and the rotation's signs `[size]`."""
        rng = torch_stream(self.seed, "subspace", self.number)
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[torch.randperm(self.size, generator=rng)[: self.kept]] = True
        return mask, random_signs(self.size, rng)

    def __call__(self, rows: Tensor) -> Tensor:
        mask, signs = (t.to(rows.device) for t in self._drawn)
        if not self.rotated:
            return rows * mask
        signs = signs.to(rows.dtype)
        return unrotate(rotate(rows, signs) * mask, signs)


def subspace(size: int, fraction: float, rotated: bool, seed: int, number: int) -> Projection:
    """Onto max(1, round(fraction · size)) dimensions."""
    return Projection(size, max(1, round(fraction * size)), rotated, seed, number)
