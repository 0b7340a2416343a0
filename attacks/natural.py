"""Natural-image inversion.

Search the most plausible images that explain the update: the maximum a posteriori view of gradient inversion
(Balunović, Dimitrov, Staab, Vechev 2022, arXiv:2111.04706, eq. 8), in which the match of updates is the
likelihood and what natural images look like the prior. Here that is total variation along the colours of
natural images, and a range that is not left; the search starts near gray and moves as natural images vary,
by L-BFGS. The prior is heavy at first, which leads past the poor minima of batches, and fades in stages
wherever the update is explained (`fltoolkit/inversion/fading.py`), so that it costs no sharpness in the end.
The prior, the schedule and the search are no paper's.

Local steps are run through. Labels that are in doubt, and where a client took several batches which example
was in which, are parts of the guess: several start, and the worse half is dropped again and again. The match
tells right ones from wrong ones far better than the last layer alone does.

It suits smooth networks. The match of one with ReLUs or max pooling has jumps, before which a line search
ends.
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
from fltoolkit.inversion.base import LBFGSInversion
from fltoolkit.inversion.distance import Times, relative
from fltoolkit.inversion.epochs import assignments, takes_batches
from fltoolkit.inversion.fading import Fading
from fltoolkit.inversion.labels import hypotheses, infer
from fltoolkit.inversion.matching import GradientMatching, Objective, one_by_one_is_faster
from fltoolkit.inversion.prior import Outside, colour_variation
from fltoolkit.inversion.recipe import with_recipes
from fltoolkit.inversion.search import Bounds, Optimiser
from fltoolkit.inversion.spectrum import Spectrum
from fltoolkit.types import Observation, Reconstruction


@dataclass(frozen=True)
class Natural(LBFGSInversion):
    """Match the update by the most plausible images, under a prior that fades.

    restarts: starts; more where the labels are in doubt, up to `hypotheses`, each with other plausible ones,
    and where a client took several batches an epoch, `orders`, each with another order of the labels. tv:
    weight of `colour_variation` in the first stage, beside the relative squared distance. stages, fade: how
    many there are, and what part of its weight each leaves to the next. outside: weight of the mean squared
    distance from the input range. spectrum, chroma: as in `Spectrum`. labels: how labels are inferred where
    they are unknown. adapt: take the defenses into account. simulate: run several local steps through instead
    of taking their sum for one, after an estimate of how many there were where that is unknown.
    """

    name: ClassVar[str] = "natural"
    steps: int = 2000
    restarts: int = 4
    hypotheses: int = 8
    orders: int = 24
    patience: int = 100
    start_std: float = 0.05
    spectrum: float = 0.7
    chroma: float = 0.3
    tv: float = 0.1
    outside: float = 10.0
    stages: int = 4
    fade: float = 0.1
    labels: str = "auto"
    adapt: bool = True
    simulate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hypotheses >= 1, "hypotheses", ">= 1", self.hypotheses)
        require(self.orders >= 1, "orders", ">= 1", self.orders)
        require(0 < self.chroma <= 1, "chroma", "in (0, 1]", self.chroma)
        require(self.tv >= 0, "tv", ">= 0", self.tv)
        require(self.outside >= 0, "outside", ">= 0", self.outside)
        require(self.stages >= 1, "stages", ">= 1", self.stages)
        require(0 < self.fade <= 1, "fade", "in (0, 1]", self.fade)

    def infer_labels(self, observation: Observation) -> Tensor:
        return infer(self.labels, observation)

    def label_rows(self, observation: Observation, labels: Tensor, rng: torch.Generator) -> Tensor:
        guesses = self._guesses(observation)
        rows = labels.new_empty(self.restarts, len(labels))
        for i, guess in enumerate(guesses[: self.restarts]):
            share = rows[i :: len(guesses)]
            share.copy_(assignments(guess, observation, len(share), rng, 1))
        if observation.labels is not None:
            rows[0] = observation.labels  # in the client's own order, if whoever tells them knows it
        return rows

    def _guesses(self, observation: Observation) -> Tensor:
        """What the labels may be, `[m, N]`."""
        if observation.labels is not None:
            return observation.labels[None]
        return hypotheses(self.labels, observation, self.hypotheses)

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        if not self.simulate:
            return super().many(observations, rngs, progress)
        return with_recipes(self._known, observations, rngs, progress)

    def _known(
        self, observations: Sequence[Observation], rngs: Sequence[torch.Generator], progress: Progress
    ) -> list[Reconstruction]:
        """The attack on clients of one known recipe."""
        starts = max(self.restarts, self.orders) if takes_batches(observations[0]) else self.restarts
        searched = [o for o in observations if self._fixed_labels(o) is not None]
        starts = max([starts, *(len(self._guesses(o)) for o in searched)])
        return LBFGSInversion.many(replace(self, restarts=starts), observations, rngs, progress)

    def objective(self, observation: Observation) -> tuple[Objective, str]:
        fitted = adapt(observation, relative, self.tv, self.adapt)
        low, high = observation.input_range
        inside = (self.outside * fitted.strength / (high - low) ** 2, Outside(low, high))
        objective = Objective(
            fitted.distance,
            priors=(inside,),
            fading=(fitted.tv, colour_variation),
            simulate=self.simulate,
            one_by_one=one_by_one_is_faster(observation),
        )
        return objective, fitted.about

    def optimiser(self, problem: GradientMatching, z: Tensor, bounds: Bounds) -> Optimiser:
        # The weight of a prior beside a likelihood is not free.
        stages = 1 if isinstance(problem.objective.distance, Times) else self.stages
        metric = Spectrum(problem.shape, problem.inputs, self.spectrum, self.chroma)
        every = -(-self.steps // stages)
        return Fading(problem, z, self.fade, stages, every, self.history, metric)


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("natural")
