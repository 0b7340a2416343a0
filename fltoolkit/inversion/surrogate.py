"""One gradient at a surrogate model in place of a client's many local steps.

Zhu, Yao, Blaschko 2023, arXiv:2306.00127: the update of many small steps is nearly a gradient of the whole
data set at some model ŵ = α w_0 + (1 − α) w_T between what the client received, w_0, and what it sent, w_T. α
is searched together with the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fltoolkit.inversion.client import State
from fltoolkit.inversion.matching import GradientMatching, Objective
from fltoolkit.types import Observation


class SurrogateMatching(GradientMatching):
    """Gradient matching at ŵ; the last variable of a guess is its α."""

    def __init__(
        self,
        observations: Sequence[Observation],
        owner: Tensor,
        labels: Tensor | None,
        objective: Objective | None = None,
    ) -> None:
        super().__init__(observations, owner, labels, objective)
        self._moved = torch.stack([o.update for o in observations])

    @property
    def variables(self) -> int:
        return super().variables + 1

    def decode(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return super().decode(z[:, :-1], rows)

    def _updates(self, z: Tensor, params: Tensor, owner: Tensor, x: Tensor, y: Tensor) -> State:
        surrogate = params + (1 - z[:, -1:]) * self._moved[owner]
        return super()._updates(z, surrogate, owner, x, y)
