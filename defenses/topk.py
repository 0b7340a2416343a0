"""Top-k sparsification, with memory of what was not sent.

Stich, Cordonnier, Jaggi 2018, arXiv:1809.07599, section 2 (top_k, and the memory of Algorithm 1); Lin et al.
2018, arXiv:1712.01887, section 3 (momentum and clipping around it are left to the training core). Whoever
sees a message sees which entries were sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import require
from fltoolkit.feedback import with_feedback


@dataclass(frozen=True)
class TopK(Defense):
    """Send only each update's k largest entries by absolute value, k = max(1, round(fraction · D)).

    fraction: in (0, 1]. error_feedback: what a client did not send is added to its row the next time it takes
    part, so that all it sent and what is still owed add up to all its rows; this keeps D numbers a client.
    Guaranteed of the row v that is compressed: at most k entries are not zero, these are v's own, and ‖v −
    C(v)‖² ≤ (1 − k/D) ‖v‖². Without error feedback no row gets longer; with it one may, as v is the row and
    all that is owed. No differential privacy: every view's ε stays infinite.
    """

    name: ClassVar[str] = "topk"
    fraction: float = 0.1
    error_feedback: bool = True

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "fraction", "in (0, 1]", self.fraction)

    def bound(self, sensitivity: float | None) -> float | None:
        return None if self.error_feedback else sensitivity

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        if not self.error_feedback:
            return self.compress(rows)
        return with_feedback(rows, ctx, self.compress)

    def compress(self, rows: Tensor) -> Tensor:
        """C(v) of every row."""
        kept = max(1, round(self.fraction * rows.shape[1]))
        index = rows.abs().topk(kept, dim=1, sorted=False).indices
        return torch.zeros_like(rows).scatter(1, index, rows.gather(1, index))
