"""Sign compression, with memory of what was not sent.

Bernstein et al. 2018, arXiv:1802.04434 (signSGD: the bare signs, times a step size); Karimireddy et al. 2019,
arXiv:1901.09847, Algorithm 1 (EF-signSGD: signs times the mean magnitude, with error feedback). Aggregation
stays the weighted mean, not the majority vote.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.feedback import with_feedback

SCALES = ("mean", "none")


@dataclass(frozen=True)
class Sign(Defense):
    """Send only the signs of each update, times its mean magnitude or a fixed step.

    scale: "mean" sends C(v) = (‖v‖₁ / D) sign(v), "none" sends step · sign(v); the sign of zero is zero.
    step: > 0, in the units of the rows, used by "none" alone. error_feedback: what a client did not send is
    added to its row the next time it takes part, for "mean" only; this keeps D numbers a client. Guaranteed
    of the row v that is compressed: all entries but zeros have one magnitude; with "mean" ‖C(v)‖ ≤ ‖v‖ and ‖v
    − C(v)‖² ≤ (1 − ‖v‖₁² / (D ‖v‖²)) ‖v‖² ≤ (1 − 1/D) ‖v‖²; with "none" ‖C(v)‖ ≤ step · √D. With error
    feedback a row may get longer, as v is the row and all that is owed. No differential privacy: every view's
    ε stays infinite.
    """

    name: ClassVar[str] = "sign"
    scale: str = "mean"
    step: float = 0.001
    error_feedback: bool = True

    def __post_init__(self) -> None:
        require(self.scale in SCALES, "scale", f"one of {SCALES}", self.scale)
        require(isfinite(self.step) and self.step > 0, "step", "a finite number > 0", self.step)
        if self.scale == "none" and self.error_feedback:
            raise InputError("error_feedback must be false with scale 'none', got True")

    def bound(self, sensitivity: float | None) -> float | None:
        return sensitivity if self.scale == "mean" and not self.error_feedback else None

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        if not self.error_feedback:
            return self.compress(rows)
        return with_feedback(rows, ctx, self.compress)

    def compress(self, rows: Tensor) -> Tensor:
        """C(v) of every row."""
        if self.scale == "none":
            return rows.sign() * self.step
        return rows.sign() * rows.abs().mean(dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)
