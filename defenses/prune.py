"""Gradient pruning: small entries are set to zero, layer by layer.

Zhu, Liu, Han 2019, arXiv:1906.08935, section 5.2, the defense that they find the most effective of those that
leave training as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import require


@dataclass(frozen=True)
class Prune(Defense):
    """Set the smallest share of every parameter tensor's entries to zero, by absolute value.

    ratio: the share, in [0, 1). Guaranteed: of a tensor's n entries, min(n − 1, round(ratio · n)) are set to
    zero and none of these is larger than one that is kept as it was; so no row gets longer. Where the model's
    layers are not known, the whole row is taken for one tensor. Nothing is remembered of what was cut. No
    differential privacy: every view's ε stays infinite.
    """

    name: ClassVar[str] = "prune"
    ratio: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, "ratio", "in [0, 1)", self.ratio)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        sizes = (rows.shape[1],) if ctx.local is None else ctx.local.layout.sizes
        return torch.cat([self._pruned(part) for part in rows.split(sizes, dim=1)], dim=1)

    def _pruned(self, part: Tensor) -> Tensor:
        """One tensor's part `[K, n]` of the rows."""
        n = part.shape[1]
        cut = max(0, min(n - 1, round(self.ratio * n)))
        index = part.abs().topk(cut, dim=1, largest=False, sorted=False).indices
        return part.scatter(1, index, 0.0)
