"""Inverting Gradients.

Geiping, Bauermeister, Dröge, Moeller 2020, arXiv:2003.14053, eq. 4: search x in the box of valid images that
minimises 1 − cos(∇_θ L(x, y), g) + α TV(x), by Adam on signed gradients with step decay. For clients that
took several local steps, those are run through with a graph kept (section 6).

The labels come first, off the last layer (section 3). The distance adapts to the defenses, which are public
(`fltoolkit/inversion/adaptation.py`); `adapt=false` is the paper's. Beyond the paper: a restart whose step
size brings nothing more goes on to the next smaller one, and stops after the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.attack import Progress, silent
from fltoolkit.inversion.adaptation import adapt
from fltoolkit.inversion.base import AdamInversion
from fltoolkit.inversion.distance import cosine
from fltoolkit.inversion.labels import infer
from fltoolkit.inversion.matching import Objective, one_by_one_is_faster
from fltoolkit.inversion.prior import total_variation
from fltoolkit.inversion.recipe import with_recipes
from fltoolkit.types import Observation, Reconstruction


@dataclass(frozen=True)
class Inverting(AdamInversion):
    """Match the direction of the update under a total-variation prior, by signed Adam.

    tv: α, the weight of total variation. labels: how labels are inferred where they are unknown. adapt: take
    the defenses into account. simulate: run several local steps through instead of taking their sum for one,
    after an estimate of how many there were where that is unknown.
    """

    name: ClassVar[str] = "inverting"
    steps: int = 4800
    restarts: int = 1
    tolerance: float = 1e-7
    tv: float = 1e-2
    labels: str = "auto"
    adapt: bool = True
    simulate: bool = True

    def infer_labels(self, observation: Observation) -> Tensor:
        return infer(self.labels, observation)

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        if not self.simulate:
            return super().many(observations, rngs, progress)
        return with_recipes(super().many, observations, rngs, progress)

    def objective(self, observation: Observation) -> tuple[Objective, str]:
        fitted = adapt(observation, cosine, self.tv, self.adapt)
        objective = Objective(
            distance=fitted.distance,
            priors=((fitted.tv, total_variation),),
            simulate=self.simulate,
            one_by_one=one_by_one_is_faster(observation),
        )
        return objective, fitted.about


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("inverting")
