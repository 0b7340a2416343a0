"""A data set of its own for every local epoch.

A client shuffles before each epoch, so the adversary does not know which examples met in a batch. Dimitrov,
Balunović, Konstantinov, Vechev 2022, arXiv:2206.12395, search inputs for each epoch e separately, so that the
order of an epoch is part of the guess, and pull the epochs together by what no order changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fltoolkit.inversion.client import Update, local_steps
from fltoolkit.inversion.distance import TINY, dot
from fltoolkit.inversion.matching import GradientMatching, Objective
from fltoolkit.types import Layout, LocalSpec, Observation

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(2),
    "max": lambda x: x.amax(2),
}
"""g of an epoch's inputs: `[S, E, N, d]` -> `[S, E, d]`."""

DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {"l2": torch.square, "l1": torch.abs}
"""D_inv of two such statistics, before the mean over their d values."""


def takes_batches(observation: Observation) -> bool:
    """Whether it matters in which order a client met its examples: it took several batches an epoch."""
    local = observation.local
    return local is not None and local.batch is not None and local.batch < observation.per_client


def sets(observation: Observation) -> int:
    """Data sets in a guess: E, or 1 where all epochs are alike, each being a single batch."""
    local = observation.local
    return local.epochs if local is not None and takes_batches(observation) else 1


class EpochMatching(GradientMatching):
    """Gradient matching over guesses that hold a data set for each epoch, one after the other.

    Guesses decode to x `[S, E N, *shape]` and y `[S, E N]`; labels are `[S, E N]` too.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        owner: Tensor,
        labels: Tensor | None,
        objective: Objective | None = None,
    ) -> None:
        self.sets = sets(observations[0])
        super().__init__(observations, owner, labels, objective)
        self.batch *= self.sets
        self.inputs *= self.sets

    def _several(self, gradient: Update, local: LocalSpec, clients: int) -> Update:
        return local_steps(gradient, local, clients, self.sets)


@dataclass(frozen=True)
class EpochInvariance:
    """1/E² Σ_{e, e'} D_inv(g(X_e), g(X_e')) for the inputs X_e of the epochs, as a prior: 0 for a client that
    sees the same examples in every epoch, whatever their order."""

    sets: int
    statistic: str = "mean"
    metric: str = "l2"

    def __call__(self, x: Tensor, params: Tensor, owner: Tensor) -> Tensor:
        g = STATISTICS[self.statistic](x.unflatten(1, (self.sets, -1)).flatten(3))
        return DISTANCES[self.metric](g[:, :, None] - g[:, None]).flatten(1).mean(1)


@dataclass(frozen=True, eq=False)
class Layered:
    """Σ_l λ_l ‖g_l − t_l‖² / Σ_l λ_l ‖t_l‖² over layers l, 1 for g = 0. weights: λ_l by coordinate `[D]`."""

    weights: Tensor

    @classmethod
    def falling(cls, layout: Layout, device: torch.device) -> Layered:
        """λ_l = exp(−l), for the weight and bias of layer l alike."""
        modules = list(dict.fromkeys(n.rpartition(".")[0] for n in layout.names))
        depth = [modules.index(n.rpartition(".")[0]) for n in layout.names]
        values = torch.exp(-torch.tensor(depth, dtype=torch.float32))
        return cls(values.repeat_interleave(torch.tensor(layout.sizes)).to(device))

    def __call__(self, g: Tensor, t: Tensor) -> Tensor:
        size = dot(t * self.weights, t).clamp_min(TINY)
        g.sub_(t)
        apart = g.clone()
        g.mul_(self.weights)
        d = dot(apart, g) / size
        g.mul_((2 / size)[:, None])
        return d


def assignments(
    labels: Tensor, observation: Observation, restarts: int, rng: torch.Generator, count: int
) -> Tensor:
    """Guesses `[restarts, count N]` of which label is where: `count` orders of the labels `[N]`, one for each
    epoch or one for all.

    Orders that differ only within batches are the same guess; guesses are different as far as they can be.
    """
    found = dict[tuple[int, ...], Tensor]()
    for _ in range(20 * restarts):
        orders = [labels[torch.randperm(len(labels), generator=rng).to(labels.device)] for _ in range(count)]
        guess = torch.cat([_sorted(y, observation) for y in orders])
        found.setdefault(tuple(guess.tolist()), guess)
        if len(found) == restarts:
            break
    rows = torch.stack(list(found.values()))
    return rows[torch.arange(restarts) % len(rows)]


def _sorted(labels: Tensor, observation: Observation) -> Tensor:
    """One epoch's labels `[N]`, in increasing order within each batch of each client."""
    local, shares = observation.local, labels.chunk(observation.clients)
    size = (local.batch if local is not None else None) or len(labels)
    return torch.cat([b.sort().values for share in shares for b in share.split(size)])


def combine(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The data sets of `count` epochs, x `[E N, ...]` and y `[E N]`, as one `[N, ...]`: each is put in the
    order of the first by the assignment of least squared error among equal labels, and the mean is taken."""
    epochs, labels = x.unflatten(0, (count, -1)), y.unflatten(0, (count, -1))
    first = epochs[0].flatten(1).double()
    aligned = [epochs[0]]
    for epoch, own in zip(epochs[1:], labels[1:], strict=True):
        cost = torch.cdist(first, epoch.flatten(1).double()).square()
        cost = cost + (labels[0][:, None] != own[None]) * (1 + 2 * cost.sum())
        order = linear_sum_assignment(cost.cpu().numpy())[1]
        aligned.append(epoch[torch.as_tensor(order, device=x.device)])
    return torch.stack(aligned).mean(0), labels[0]
