"""Data Leakage in Federated Averaging (DLFA).

Dimitrov, Balunović, Konstantinov, Vechev 2022, arXiv:2206.12395: the client's local training is run through
on guessed inputs, a data set X_e for each of the E epochs, and matched with its update Δ,

    min_X  L_rec(Δ(X), Δ) + λ_inv 1/E² Σ_{e, e'} D_inv(g(X_e), g(X_e')) + λ_TV TV(X),

by Adam. g is a statistic that the order of an epoch does not change, the mean or maximum over its inputs, and
D_inv a squared or absolute distance. L_rec is squared, with weights that fall by e from layer to layer as in
the paper's code, here relative to the update of zero. In the end the epochs are matched and averaged.

The label counts come first. Which label was in which batch is unknown: each restart tries another assignment
for every epoch, ranked by the objective; the paper tries one, the same in all epochs. Where an epoch is a
single batch all epochs are alike, and one data set serves them. Where E, B and η are unknown they are
estimated (`fltoolkit/inversion/recipe.py`). The paper has λ_inv = 1000 on FEMNIST, beside an absolute L_rec,
and for CIFAR-100 takes g of the features of a random convolution, which is not offered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.attack import Progress, silent
from fltoolkit.errors import require
from fltoolkit.inversion.adaptation import adapt
from fltoolkit.inversion.base import AdamInversion
from fltoolkit.inversion.distance import Distance, cosine
from fltoolkit.inversion.epochs import (
    DISTANCES,
    STATISTICS,
    EpochInvariance,
    EpochMatching,
    Layered,
    assignments,
    combine,
    sets,
)
from fltoolkit.inversion.labels import infer
from fltoolkit.inversion.matching import GradientMatching, Objective, one_by_one_is_faster
from fltoolkit.inversion.prior import Prior, total_variation
from fltoolkit.inversion.recipe import with_recipes
from fltoolkit.types import Observation, Reconstruction

REC = ("layers", "cosine")


@dataclass(frozen=True)
class DLFA(AdamInversion):
    """Run the local training through on inputs of each epoch, which a prior blind to their order relates.

    restarts: assignments of labels to batches. rec: L_rec, "layers" as in the paper or "cosine". inv: λ_inv.
    g: "mean" or "max". d_inv: "l2" or "l1". tv: λ_TV. labels: how labels are inferred where they are unknown.
    adapt: take the defenses into account.
    """

    name: ClassVar[str] = "dlfa"
    matching: ClassVar[type[GradientMatching]] = EpochMatching
    steps: int = 1000
    restarts: int = 32
    tolerance: float = 1e-7
    lr: float = 0.4
    signed: bool = False
    rec: str = "layers"
    inv: float = 1.0
    g: str = "mean"
    d_inv: str = "l2"
    tv: float = 1e-4
    labels: str = "auto"
    adapt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rec in REC, "rec", f"one of {REC}", self.rec)
        require(self.g in STATISTICS, "g", f"one of {tuple(STATISTICS)}", self.g)
        require(self.d_inv in DISTANCES, "d_inv", f"one of {tuple(DISTANCES)}", self.d_inv)
        require(self.inv >= 0, "inv", ">= 0", self.inv)
        require(self.tv >= 0, "tv", ">= 0", self.tv)

    def infer_labels(self, observation: Observation) -> Tensor:
        return infer(self.labels, observation)

    def label_rows(self, observation: Observation, labels: Tensor, rng: torch.Generator) -> Tensor:
        return assignments(labels, observation, self.restarts, rng, sets(observation))

    def objective(self, observation: Observation) -> tuple[Objective, str]:
        o = observation
        distance: Distance = Layered.falling(o.layout, o.params.device) if self.rec == "layers" else cosine
        fitted = adapt(o, distance, self.tv, self.adapt)
        low, high = o.input_range
        priors: list[tuple[float, Prior]] = [(fitted.tv, total_variation)]
        if self.inv and sets(o) > 1:
            unit = (high - low) ** (2 if self.d_inv == "l2" else 1)
            priors.append((self.inv * fitted.strength / unit, EpochInvariance(sets(o), self.g, self.d_inv)))
        objective = Objective(
            fitted.distance, tuple(priors), simulate=True, one_by_one=one_by_one_is_faster(o)
        )
        return objective, fitted.about

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        return with_recipes(self._known, observations, rngs, progress)

    def _known(
        self, observations: Sequence[Observation], rngs: Sequence[torch.Generator], progress: Progress
    ) -> list[Reconstruction]:
        """The attack on clients of one known recipe."""
        found = super().many(observations, rngs, progress)
        joined = [combine(f.x, f.y, sets(o)) for f, o in zip(found, observations, strict=True)]
        return [replace(f, x=x, y=y) for f, (x, y) in zip(found, joined, strict=True)]


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("dlfa")
