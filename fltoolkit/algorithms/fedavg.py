"""Federated averaging.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas 2017, arXiv:1602.05629, Algorithm 1:

    initialise w_0
    for each round t = 1, 2, ...:
        m ← max(C·K, 1);  S_t ← random set of m clients
        for each client k in S_t in parallel:  w_{t+1}^k ← ClientUpdate(k, w_t)
        w_{t+1} ← Σ_k (n_k / n) w_{t+1}^k

The last line is kept as w_t + Σ_k (n_k / n) (w_{t+1}^k − w_t), n the sum over S_t: the same value, and
the differences are what the defenses act on. FedSGD is E = 1, B = ∞.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from fltoolkit.defense import Sampling
from fltoolkit.errors import require
from fltoolkit.rng import stream
from fltoolkit.training.round import NOTHING, Memory, Outcome, run_round
from fltoolkit.training.task import Task, alike
from fltoolkit.types import Examples, LocalSpec


def fedsgd(lr: float) -> LocalSpec:
    """The local recipe that makes FedAvg FedSGD: one full-batch step."""
    return LocalSpec(epochs=1, batch=None, lr=lr)


def select_clients(total: int, fraction: float, seed: int, number: int, sampling: str = "fixed") -> list[int]:
    """S_t: max(round(C·K), 1) of K = `total` clients without replacement, in increasing order; or, with
    sampling "poisson", each client by itself with probability C."""
    rng = stream(seed, "round", number, "cohort")
    if sampling == "poisson":
        return np.flatnonzero(rng.random(total) < fraction).tolist()
    chosen = rng.choice(total, max(round(fraction * total), 1), replace=False)
    return sorted(int(c) for c in chosen)


def cohort_sampling(
    task: Task, clients: Sequence[Examples], fraction: float, sampling: str = "fixed"
) -> Sampling:
    """How `select_clients` chooses, as the accounting must know it."""
    total = len(clients)
    if sampling == "poisson":
        return Sampling("poisson", fraction, total)
    size = max(round(fraction * total), 1)
    kind = "full" if size == total else "fixed"
    return Sampling(kind, size / total, total, alike(task, clients, sampling))


def server_update(params: Tensor, aggregate: Tensor, server_lr: float = 1.0) -> Tensor:
    """w_{t+1} = w_t + server_lr · the aggregated difference; 1 is the paper's mean of models."""
    return params + server_lr * aggregate


def fedavg(
    task: Task,
    params: Tensor,
    clients: Sequence[Examples],
    fraction: float,
    rounds: Iterable[int],
    witnessed: Callable[[int], bool] = lambda _: True,
    sampling: str = "fixed",
    memory: Memory = NOTHING,
) -> Iterator[tuple[Outcome, Tensor]]:
    """Run the given round numbers from `params`; yields each round's outcome and w_{t+1} `[D]`.

    witnessed: whether somebody looks on in a round, so that its transcript must be kept. sampling: how S_t
    is chosen, see `select_clients`. memory: what defenses kept of earlier rounds.
    """
    require(0 <= fraction <= 1, "fraction", "between 0 and 1", fraction)
    how = cohort_sampling(task, clients, fraction, sampling)
    for number in rounds:
        cohort = select_clients(len(clients), fraction, task.seed, number, sampling)
        outcome = run_round(task, params, cohort, clients, number, witnessed(number), how, memory)
        memory = outcome.memory
        params = server_update(params, outcome.aggregate, task.server_lr)
        yield outcome, params
