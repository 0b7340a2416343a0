"""GradInversion: see through gradients.

Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov 2021, arXiv:2104.07586: labels from the minima of the last
layer's gradient, then

    min_x  α_G ‖∇_θ L(x, y) − g‖² + α_TV TV(x) + α_l2 ‖x‖₂ + α_BN R_BN(x) + α_group R_group(x)

(eq. 1 and 8-11) by Adam with a warm-up and cosine decay, from several seeds that pull each other to their
mean. R_BN compares BatchNorm's inputs with the batch's own statistics, which a client gives away that sends
BatchNorm's buffers along (`statistics=sent`). Huang et al. 2021, arXiv:2112.00059, show how much hangs on
that and what may stand in: `running` takes a trained model's, `estimated` measures them on public data,
`none` does without. "auto" takes the first of sent, estimated, running, none that there is.

Unlike the paper: consensus is the plain mean, not a registered one, no noise is added to pixels, and the
distance is relative to ‖g‖². It adapts to the defenses as in `inverting`; `adapt=false` leaves it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fltoolkit.errors import require
from fltoolkit.inversion.adaptation import adapt
from fltoolkit.inversion.base import AdamInversion
from fltoolkit.inversion.consensus import Consensus
from fltoolkit.inversion.distance import cosine, relative
from fltoolkit.inversion.labels import infer
from fltoolkit.inversion.lbfgs import Objective as Energy
from fltoolkit.inversion.matching import GradientMatching, Objective, one_by_one_is_faster
from fltoolkit.inversion.prior import Prior, norm, total_variation
from fltoolkit.inversion.statistics import BatchNormStatistics
from fltoolkit.types import Observation

DISTANCES = {"squared": relative, "cosine": cosine}
STATISTICS = ("auto", *BatchNormStatistics.SOURCES, "none")


@dataclass(frozen=True)
class GradInversion(AdamInversion):
    """Match the update under priors of total variation, norm, BatchNorm statistics and agreement of seeds.

    tv, l2, bn, group: α_TV, α_l2, α_BN, α_group, with α_G = 1 on the relative distance. distance: the
    paper's "squared", or the "cosine" of `inverting` for a model that is trained so well that the updates of
    early guesses are many times longer than the observed one. statistics: where BatchNorm's statistics come
    from: "sent", "running", "estimated", "none" or "auto". labels, adapt, simulate as in `inverting`.
    """

    name: ClassVar[str] = "gradinversion"
    steps: int = 5000
    restarts: int = 4
    tolerance: float = 1e-7
    decay: str = "cosine"
    signed: bool = False
    warmup: int = 50
    tv: float = 1e-2
    l2: float = 1e-4
    bn: float = 0.1
    group: float = 1e-2
    distance: str = "squared"
    statistics: str = "auto"
    labels: str = "gradinversion"
    adapt: bool = True
    simulate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.distance in DISTANCES, "distance", f"one of {tuple(DISTANCES)}", self.distance)
        require(self.statistics in STATISTICS, "statistics", f"one of {STATISTICS}", self.statistics)
        for weight in ("tv", "l2", "bn", "group"):
            require(getattr(self, weight) >= 0, weight, ">= 0", getattr(self, weight))

    def infer_labels(self, observation: Observation) -> Tensor:
        return infer(self.labels, observation)

    def source(self, observation: Observation) -> str:
        """Where the BatchNorm statistics come from, once "auto" is decided."""
        if self.statistics != "auto":
            return self.statistics
        if not any(isinstance(m, nn.BatchNorm2d) for m in observation.model.modules()):
            return "none"
        if observation.buffers is not None and observation.local_steps == 1:
            return "sent"
        return "running" if observation.auxiliary is None else "estimated"

    def objective(self, observation: Observation) -> tuple[Objective, str]:
        fitted = adapt(observation, DISTANCES[self.distance], self.tv, self.adapt)
        low, high = observation.input_range
        priors: list[tuple[float, Prior]] = [
            (fitted.tv, total_variation),
            (self.l2 / (high - low), norm),
        ]
        objective = Objective(
            fitted.distance, tuple(priors), self.simulate, one_by_one_is_faster(observation)
        )
        return objective, fitted.about

    def problem(
        self, observations: Sequence[Observation], owner: Tensor, labels: Tensor | None
    ) -> GradientMatching:
        found = super().problem(observations, owner, labels)
        source = self.source(observations[0])
        if source != "none" and self.bn:
            found.add_prior(self.bn, BatchNormStatistics(observations, source))
        return found

    def energy(self, problem: GradientMatching) -> Energy:
        return Consensus(problem, self.group) if self.group and self.restarts > 1 else problem


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("gradinversion")
