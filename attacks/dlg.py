"""Deep Leakage from Gradients (DLG).

Zhu, Liu, Han 2019, arXiv:1906.08935, Algorithm 1: search a dummy batch x' and dummy label logits y'
whose gradient matches the observed one, min ‖∇_θ L(F(x'), softmax(y')) − g‖², by L-BFGS. The
attack knows no defense: a clipped or noised gradient is matched as if it were the true one, unless
`adapt=true`.

Beyond the paper: several restarts, ranked by the matching loss alone; a line search in L-BFGS, so that a
step never makes the match worse; and a start closer to grey, 0.5 + 0.3 N(0, 1) on inputs in [0, 1]
(`start_std=1` has the paper's variance), which needs about half the iterations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fltoolkit.inversion.base import LBFGSInversion


@dataclass(frozen=True)
class DLG(LBFGSInversion):
    """Match the gradient by searching inputs and labels together."""

    name: ClassVar[str] = "dlg"


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("dlg")
