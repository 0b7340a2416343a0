"""Group consistency: restarts of a victim pull each other to what they agree on."""

from __future__ import annotations

import torch
from torch import Tensor

from fltoolkit.inversion.matching import GradientMatching


class Consensus:
    """An objective with w ‖x_s − x̄‖² added, the mean over the values of the inputs, where x̄ is the mean of
    the victim's guesses that are still searched (Yin et al. 2021, arXiv:2104.07586, eq. 11, with the
    pixel-wise mean, not registered, as consensus). All rows of a victim must be evaluated in one call."""

    def __init__(self, problem: GradientMatching, weight: float) -> None:
        self.problem, self.weight = problem, weight

    def __call__(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = self.problem(z, rows)
        owner, n = self.problem.owner[rows], self.problem.inputs
        count = torch.zeros(int(owner.max()) + 1, device=z.device).index_add_(0, owner, torch.ones_like(loss))
        x = z[:, :n]
        total = torch.zeros(len(count), n, device=z.device).index_add_(0, owner, x)
        apart = x - (total / count.clamp_min(1)[:, None])[owner]
        gradient = gradient.clone()
        gradient[:, :n] += 2 * self.weight / n * apart
        return loss + self.weight * apart.square().mean(1), gradient
