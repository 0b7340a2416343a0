"""Surrogate Model Extension (SME).

Zhu, Yao, Blaschko 2023, arXiv:2306.00127: read the update of many local steps as one gradient of the whole
data set, at a surrogate model between the one received and the one sent,

    min_{x, α}  1 − cos(∇_w L(x, y; ŵ), w_0 − w_T) + λ TV(x),    ŵ = α w_0 + (1 − α) w_T,  α in [0, 1],

by Adam from α = ½, with step decay. It needs neither E, B nor η, and an iteration costs one step's gradient
however many the client took. It is made for many small steps: a few large ones do not lie near a segment.
The labels come first.

Unlike the paper, whose code has η = 1 and β = 0.001 on plain gradients in 1000 iterations: signed gradients,
which here reach the same end with smaller steps, and several restarts, ranked by the objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.errors import require
from fltoolkit.inversion.adam import Adam
from fltoolkit.inversion.adaptation import adapt
from fltoolkit.inversion.base import AdamInversion
from fltoolkit.inversion.distance import cosine
from fltoolkit.inversion.labels import infer
from fltoolkit.inversion.matching import GradientMatching, Objective, one_by_one_is_faster
from fltoolkit.inversion.prior import total_variation
from fltoolkit.inversion.search import Bounds, Optimiser
from fltoolkit.inversion.surrogate import SurrogateMatching
from fltoolkit.types import Observation


@dataclass(frozen=True)
class SME(AdamInversion):
    """Match the direction of the update by one gradient at a surrogate model that is searched too.

    lr: η, the step size of the inputs. alpha: where α starts, 1 being the broadcast model. beta: β, the step
    size of α; 0 keeps it. tv: λ, the weight of total variation. labels: how labels are inferred where they
    are unknown. adapt: take the defenses into account.
    """

    name: ClassVar[str] = "sme"
    matching: ClassVar[type[GradientMatching]] = SurrogateMatching
    steps: int = 2000
    restarts: int = 2
    tolerance: float = 1e-7
    lr: float = 0.1
    alpha: float = 0.5
    beta: float = 0.01
    tv: float = 1e-2
    labels: str = "auto"
    adapt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, "alpha", "between 0 and 1", self.alpha)
        require(self.beta >= 0, "beta", ">= 0", self.beta)
        require(self.tv >= 0, "tv", ">= 0", self.tv)

    def infer_labels(self, observation: Observation) -> Tensor:
        return infer(self.labels, observation)

    def objective(self, observation: Observation) -> tuple[Objective, str]:
        fitted = adapt(observation, cosine, self.tv, self.adapt)
        one_by_one = one_by_one_is_faster(observation)
        return Objective(
            fitted.distance, ((fitted.tv, total_variation),), one_by_one=one_by_one
        ), fitted.about

    def start(self, problem: GradientMatching, rng: torch.Generator, bounds: Bounds) -> Tensor:
        z = super().start(problem, rng, bounds)
        z[:, -1] = self.alpha
        return z

    def optimiser(self, problem: GradientMatching, z: Tensor, bounds: Bounds) -> Optimiser:
        found = super().optimiser(problem, z, bounds)
        assert isinstance(found, Adam)
        assert found.box is not None
        found.unit[-1] = self.beta / self.lr
        found.box[0][-1], found.box[1][-1] = 0.0, 1.0
        return found


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("sme")
