"""The base of attacks that search for a batch whose gradient matches the observed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fltoolkit.attack import Attack, Progress, silent
from fltoolkit.errors import InputError, require
from fltoolkit.inversion.search import search
from fltoolkit.types import Observation, Reconstruction


@dataclass(frozen=True)
class GradientInversion(Attack):
    """Options that every such attack has; a subclass says how it comes by the labels.

    steps: most L-BFGS iterations of a restart. restarts: random starts a victim, ranked by matching loss.
    history: L-BFGS pairs. tolerance: stop at a matching loss of tolerance · ‖g‖². start_std: standard
    deviation of the normal start around the middle of the input range, in units of that range.
    """

    steps: int = 3000
    restarts: int = 4
    history: int = 100
    tolerance: float = 1e-8
    start_std: float = 0.3

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", ">= 1", self.steps)
        require(self.restarts >= 1, "restarts", ">= 1", self.restarts)
        require(self.history >= 1, "history", ">= 1", self.history)
        require(self.tolerance >= 0, "tolerance", ">= 0", self.tolerance)
        require(self.start_std > 0, "start_std", "> 0", self.start_std)

    def infer_labels(self, observation: Observation) -> Tensor | None:
        """Labels `[N]` to hold fixed during the search, or None to search them too."""
        return None

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        for o in observations:
            check_observation(o)
        inferred = [o.labels if o.labels is not None else self.infer_labels(o) for o in observations]
        fixed = [y for y in inferred if y is not None]
        labels = torch.stack(fixed) if len(fixed) == len(inferred) else None
        return search(observations, rngs, labels, self, progress)


def check_observation(observation: Observation) -> None:
    """Refuse, before any work, an update that no search can match; the error names the bad layer."""
    layout = observation.layout
    for name, row in (("params", observation.params), ("update", observation.update)):
        if row.shape != (layout.size,):
            got = tuple(row.shape)
            raise InputError(f"{name} must be a row of {layout.size} numbers, got shape {got}")
        bad = layout.first_non_finite(row)
        if bad is not None:
            raise InputError(f"{name} must be finite, got NaN or infinity in layer {bad!r}")
