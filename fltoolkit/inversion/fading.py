"""A prior that fades: heavy while the search is far off, light once the update is explained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fltoolkit.inversion.lbfgs import LBFGS, Metric
from fltoolkit.inversion.matching import GradientMatching

OWN = ("weight", "stage", "since")


class Fading(LBFGS):
    """L-BFGS on misfit + w penalty, with a weight w for each row that falls by stages.

    The misfit is `problem`; the penalty and the first w are `problem.objective.fading`. Each later of
    `stages` stages has `fade` times the weight of the one before. A stage lasts `every` iterations, or until
    it is hastened or finds no descent. A row keeps its weight where its
    misfit exceeds w penalty at a stage's end: what a guess cannot explain, because a label is wrong or there
    is noise, a lighter prior would only explain by noise in the inputs.
    """

    def __init__(
        self,
        problem: GradientMatching,
        z: Tensor,
        fade: float,
        stages: int,
        every: int,
        history: int,
        metric: Metric | None = None,
    ) -> None:
        assert problem.objective.fading is not None
        weight, self.prior = problem.objective.fading
        self.problem = problem
        self.fade, self.last, self.every = fade, stages - 1, every
        self.weight = z.new_full((len(z),), weight)
        self.stage = torch.zeros(len(z), dtype=torch.long, device=z.device)
        self.since = torch.zeros_like(self.stage)
        super().__init__(self._total, z, history, metric)

    @property
    def settled(self) -> Tensor:
        """Rows `[S]` in their last stage."""
        return self.stage[self.rows] == self.last

    def hasten(self, mask: Tensor) -> None:
        """Move the rows of `mask [S]` that are not in their last stage to the next."""
        at = (mask & ~self.settled).nonzero()[:, 0]
        if len(at) == 0:
            return
        rows = self.rows[at]
        misfit, down = self.problem(self.z[at], rows)
        penalty, rough = self._penalty(self.z[at], rows)
        self.evaluations += len(at)
        held = misfit > self.weight[rows] * penalty
        self.weight[rows] *= torch.where(held, 1.0, self.fade)
        w = self.weight[rows]
        self.stage[rows] += 1
        self.since[rows] = self.taken
        self.anew(at, misfit + w * penalty, down + w[:, None] * rough)

    def step(self) -> None:
        """One iteration of every row, in the next stage where it is time for it."""
        self.hasten(self.stalled | (self.taken - self.since[self.rows] >= self.every))
        super().step()

    def state(self) -> dict[str, Any]:
        return super().state() | {name: getattr(self, name) for name in OWN}

    def _total(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        misfit, down = self.problem(z, rows)
        penalty, rough = self._penalty(z, rows)
        w = self.weight[rows]
        return misfit + w * penalty, down + w[:, None] * rough

    def _penalty(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty `[S]` of guesses z `[S, n]`, and its gradient."""
        z, owner = z.detach().requires_grad_(), self.problem.owner[rows]
        penalty = self.prior(self.problem.decode(z, rows)[0], self.problem.params[owner], owner)
        return penalty.detach(), torch.autograd.grad(penalty.sum(), z)[0]
