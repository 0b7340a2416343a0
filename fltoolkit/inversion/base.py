"""The bases of attacks that search for a batch whose update matches the observed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import eq
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.attack import Attack, Progress, grouped, silent
from fltoolkit.checks import check_precision
from fltoolkit.errors import require
from fltoolkit.inversion.adam import Adam, Schedule
from fltoolkit.inversion.adaptation import adapt, mixes
from fltoolkit.inversion.checks import check_observation, check_searchable, stackable
from fltoolkit.inversion.diagnosis import diagnose
from fltoolkit.inversion.distance import Distance, squared
from fltoolkit.inversion.labels.layer import labels_hidden
from fltoolkit.inversion.lbfgs import LBFGS
from fltoolkit.inversion.lbfgs import Objective as Energy
from fltoolkit.inversion.matching import GradientMatching, Objective
from fltoolkit.inversion.prior import total_variation
from fltoolkit.inversion.search import Bounds, Optimiser, search
from fltoolkit.inversion.spectrum import Spectrum
from fltoolkit.types import Observation, Reconstruction


@dataclass(frozen=True)
class GradientInversion(Attack):
    """Options that every such attack has; a subclass says how it comes by the labels, what it minimises and
    by what optimiser.

    steps: most iterations of a restart. restarts: random starts a victim, ranked by the objective. tolerance:
    stop at tolerance times the distance of an update of zero. patience: iterations without a gain of 2 %
    after which a restart stops or goes on to the next stage of its schedule; 0 never. adapt: take the
    defenses into account, which the papers' attacks do not. compile, precision, rough: how the objective is
    evaluated (`Objective`); rough goes with the optimiser.
    """

    matching: ClassVar[type[GradientMatching]] = GradientMatching
    rough: ClassVar[bool] = False
    steps: int = 3000
    restarts: int = 4
    tolerance: float = 1e-8
    patience: int = 200
    adapt: bool = False
    compile: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", ">= 1", self.steps)
        require(self.restarts >= 1, "restarts", ">= 1", self.restarts)
        require(self.tolerance >= 0, "tolerance", ">= 0", self.tolerance)
        require(self.patience >= 0, "patience", ">= 0", self.patience)
        check_precision(self.precision)

    def infer_labels(self, observation: Observation) -> Tensor | None:
        """Labels `[N]` to hold fixed during the search, or None to search them too."""
        return None

    def label_rows(self, observation: Observation, labels: Tensor, rng: torch.Generator) -> Tensor:
        """What the search holds fixed of the labels `[N]`: themselves, or a line for each restart."""
        return labels

    def objective(self, observation: Observation) -> tuple[Objective, str]:
        """What to minimise, and in words how it was adapted to the defenses (empty: not at all)."""
        return Objective(), ""

    def problem(
        self, observations: Sequence[Observation], owner: Tensor, labels: Tensor | None
    ) -> GradientMatching:
        objective, _ = self.objective(observations[0])
        if not objective.one_by_one and not stackable(observations[0]):
            objective = replace(objective, one_by_one=True)
        objective = replace(objective, compile=self.compile, precision=self.precision, rough=self.rough)
        return self.matching(observations, owner, labels, objective)

    def start(self, problem: GradientMatching, rng: torch.Generator, bounds: Bounds) -> Tensor:
        """A victim's random guesses `[restarts, n]`."""
        raise NotImplementedError

    def optimiser(self, problem: GradientMatching, z: Tensor, bounds: Bounds) -> Optimiser:
        raise NotImplementedError

    def floats_per_row(self, variables: int) -> int:
        """Numbers that the optimiser keeps for a guess."""
        raise NotImplementedError

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        for o in observations:
            check_observation(o)
        check_searchable(observations[0])
        inferred = [self._fixed_labels(o) for o in observations]
        found: dict[int, Reconstruction] = {}
        for at in self._groups(observations, inferred):
            rows = [(observations[i], inferred[i], rngs[i]) for i in at]
            fixed = [self.label_rows(o, y, rng) for o, y, rng in rows if y is not None]
            labels = torch.stack(fixed) if fixed else None
            results = search([o for o, _, _ in rows], [rng for _, _, rng in rows], labels, self, progress)
            found |= zip(at, results, strict=True)
        hidden = [y is None and labels_hidden(o) for o, y in zip(observations, inferred, strict=True)]
        return [self._explained(found[i], o, hidden[i]) for i, o in enumerate(observations)]

    def _groups(
        self, observations: Sequence[Observation], labels: Sequence[Tensor | None]
    ) -> list[list[int]]:
        """Positions of those that are searched together: what a defense did may differ from one to another,
        and with it the distance that fits."""

        def distance(o: Observation) -> Distance | None:
            return self.objective(o)[0].distance if o.defenses else None

        return grouped([(y is None, distance(o)) for o, y in zip(observations, labels, strict=True)], eq)

    def _fixed_labels(self, o: Observation) -> Tensor | None:
        if self.adapt and mixes(o):
            return None
        if o.labels is not None:
            return o.labels
        return None if self.adapt and labels_hidden(o) else self.infer_labels(o)

    def _explained(self, found: Reconstruction, o: Observation, hidden: bool) -> Reconstruction:
        objective, adaptation = self.objective(o)
        if adaptation and hidden:
            adaptation += "; labels, which the defense hides, searched too"
        scale = float(objective.distance(torch.zeros_like(o.update)[None], o.gradient[None]))
        return replace(found, adaptation=adaptation, diagnosis=diagnose(o, found.loss, scale))


@dataclass(frozen=True)
class LBFGSInversion(GradientInversion):
    """Descent by L-BFGS from normal noise.

    history: L-BFGS pairs. start_std: standard deviation of the start around the middle of the input range, in
    units of that range. spectrum: p of a `Spectrum` that scales the search's directions like those of natural
    images; 0 is the papers' plain search, 0.5 with `start_std=0.02` needs about a quarter of its iterations
    on photographs. simulate: run several local steps through where E, B and η are known.
    """

    history: int = 100
    start_std: float = 0.3
    spectrum: float = 0.0
    simulate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.history >= 1, "history", ">= 1", self.history)
        require(0 <= self.spectrum <= 2, "spectrum", "in 0..2", self.spectrum)
        require(self.start_std > 0, "start_std", "> 0", self.start_std)

    def objective(self, observation: Observation) -> tuple[Objective, str]:
        fitted = adapt(observation, squared, 0.0, self.adapt)
        priors = ((fitted.tv, total_variation),) if fitted.tv else ()
        return Objective(fitted.distance, priors, self.simulate), fitted.about

    def start(self, problem: GradientMatching, rng: torch.Generator, bounds: Bounds) -> Tensor:
        return noise(problem, rng, bounds, self.restarts, self.start_std)

    def optimiser(self, problem: GradientMatching, z: Tensor, bounds: Bounds) -> Optimiser:
        metric = Spectrum(problem.shape, problem.inputs, self.spectrum) if self.spectrum else None
        return LBFGS(problem, z, self.history, metric)

    def floats_per_row(self, variables: int) -> int:
        return 2 * self.history * variables


@dataclass(frozen=True)
class AdamInversion(GradientInversion):
    """Descent by Adam inside the box of valid inputs.

    lr: the first step size, in units of a quarter of the input range, about the standard deviation of an
    image's pixels. decay: "step", "cosine" or "none". signed: use the gradient's signs only. warmup:
    iterations until the full rate. start_std as in `LBFGSInversion`.
    """

    rough: ClassVar[bool] = True
    lr: float = 0.1
    decay: str = "step"
    signed: bool = True
    warmup: int = 0
    start_std: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start_std > 0, "start_std", "> 0", self.start_std)
        Schedule(self.lr, self.steps, self.decay, self.warmup)

    def start(self, problem: GradientMatching, rng: torch.Generator, bounds: Bounds) -> Tensor:
        return noise(problem, rng, bounds, self.restarts, self.start_std)

    def optimiser(self, problem: GradientMatching, z: Tensor, bounds: Bounds) -> Optimiser:
        low, high = bounds
        free = torch.full_like(z[0], torch.inf)
        free[: problem.inputs] = 0.0
        unit = torch.where(free == 0, (high - low) / 4, 1.0)
        schedule = Schedule(self.lr, self.steps, self.decay, self.warmup)
        return Adam(self.energy(problem), z, schedule, self.signed, (low - free, high + free), unit)

    def energy(self, problem: GradientMatching) -> Energy:
        """What Adam minimises: the problem, or that with terms between a victim's guesses."""
        return problem

    def floats_per_row(self, variables: int) -> int:
        return 4 * variables


def noise(
    problem: GradientMatching, rng: torch.Generator, bounds: Bounds, restarts: int, std: float
) -> Tensor:
    """Guesses `[restarts, n]`: inputs normal around the middle of the range with `std` of its width, label
    logits N(0, 1)."""
    low, high = bounds
    z = torch.randn(restarts, problem.variables, generator=rng)
    z[:, : problem.inputs] = 0.5 * (low + high) + std * (high - low) * z[:, : problem.inputs]
    return z
