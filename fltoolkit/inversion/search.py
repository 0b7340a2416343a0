"""The search that DLG and its kin share: start several guesses a victim, drop the hopeless, polish the rest.

All victims × restarts descend together. At fixed iterations the worse half of every victim's restarts
is dropped, by matching loss alone (successive halving; Jamieson and Talwalkar 2016, arXiv:1502.07943,
Algorithm 1), and a victim leaves the stack once its gradient is matched or nothing more is gained, so
that easy victims cost little.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fltoolkit.attack import Progress
from fltoolkit.inversion import keep
from fltoolkit.inversion.matching import GradientMatching
from fltoolkit.types import Observation, Reconstruction

FIRST_RUNG = 50
CHECK_EVERY = 25
PLATEAU_DECREASE = 0.02
GROUP_FLOATS = 4e8
"""Victims share a stack as long as their L-BFGS histories hold at most this many numbers."""


CHANGES = ("best", "loss", "evaluations", "iterations", "changed", "seconds", "notes")
"""What a stack changes beside its trace and its optimiser."""

Bounds = tuple[float, float]
"""The range of valid inputs."""


class Optimiser(Protocol):
    """What drives a stack: `LBFGS` or `Adam`."""

    rows: Tensor
    z: Tensor
    loss: Tensor
    stalled: Tensor
    evaluations: int

    @property
    def settled(self) -> Tensor: ...
    @property
    def finished(self) -> Tensor: ...
    def hasten(self, mask: Tensor) -> None: ...
    def step(self) -> None: ...
    def keep(self, index: Tensor) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class SearchSpec(Protocol):
    """The choices of an attack; `GradientInversion` documents them."""

    @property
    def steps(self) -> int: ...
    @property
    def restarts(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def patience(self) -> int: ...
    def problem(
        self, observations: Sequence[Observation], owner: Tensor, labels: Tensor | None
    ) -> GradientMatching: ...
    def start(self, problem: GradientMatching, rng: torch.Generator, bounds: Bounds) -> Tensor: ...
    def optimiser(self, problem: GradientMatching, z: Tensor, bounds: Bounds) -> Optimiser: ...
    def floats_per_row(self, variables: int) -> int: ...


def search(
    observations: Sequence[Observation],
    rngs: Sequence[torch.Generator],
    labels: Tensor | None,
    spec: SearchSpec,
    progress: Progress,
) -> list[Reconstruction]:
    """Reconstruct every victim's batch.

    labels: what is held fixed, `[V, N]` or, where restarts try several, `[V, restarts, N]`; None where labels
    are searched too.
    """
    probe = spec.problem(observations[:1], torch.zeros(1, dtype=torch.long), _rows(labels, 1, 1))
    per_victim = spec.floats_per_row(probe.variables) * spec.restarts + 2 * probe.layout.size
    size = max(1, int(GROUP_FLOATS / per_victim))
    found: list[Reconstruction] = []
    for i in range(0, len(observations), size):
        part = slice(i, i + size)
        group = _Group(observations[part], rngs[part], None if labels is None else labels[part], spec)
        found += group.run(progress)
    return found


def _rows(labels: Tensor | None, victims: int, restarts: int) -> Tensor | None:
    """Labels row by row `[victims · restarts, N]`."""
    if labels is None:
        return None
    if labels.dim() == 2:
        labels = labels[:, None].expand(-1, restarts, -1)
    return labels[:victims, :restarts].flatten(0, 1)


class _Group:
    """The victims of one stack."""

    def __init__(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        labels: Tensor | None,
        spec: SearchSpec,
    ) -> None:
        self.spec, self.victims = spec, len(observations)
        self.device = observations[0].params.device
        owner = torch.arange(self.victims, device=self.device).repeat_interleave(spec.restarts)
        self.problem = spec.problem(observations, owner, _rows(labels, self.victims, spec.restarts))
        bounds = observations[0].input_range
        start = torch.cat([spec.start(self.problem, rng, bounds) for rng in rngs])
        self.kept = keep.place(spec, observations, labels, start)
        self.begun = time.perf_counter()
        self.optimiser = spec.optimiser(self.problem, start.to(self.device), bounds)
        self.best = self.optimiser.z.clone()
        self.loss = self.optimiser.loss.clone()
        self.trace: list[Tensor] = [self.loss.clone()]
        self.evaluations = torch.ones_like(owner)
        self.iterations = torch.zeros_like(owner)
        self.changed = torch.zeros_like(owner)
        self.scale = self.problem.scale
        self.seconds = torch.zeros(self.victims, dtype=torch.float64, device=self.device)
        self.notes = ["stopped at the last allowed iteration"] * self.victims

    def run(self, progress: Progress) -> list[Reconstruction]:
        rungs = _rungs(self.spec.restarts)
        self.kept.resume(self)
        for step in range(len(self.trace), self.spec.steps + 1):
            if len(self.optimiser.rows) == 0:
                break
            self._advance()
            if step in rungs:
                self._halve()
            if step % CHECK_EVERY == 0 or step == self.spec.steps:
                self._retire(step)
                best = self.loss.view(self.victims, -1).min(1).values
                active = len(self.optimiser.rows)
                text = f"matching loss median {best.median():.3g}, worst {best.max():.3g}, {active} active"
                progress(step, self.spec.steps, text)
            self.kept.save(self)
        self.optimiser.keep(torch.empty(0, dtype=torch.long, device=self.device))
        self.kept.save(self, ended=True)
        return self._results()

    def state(self) -> dict[str, Any]:
        """All that changes from iteration to iteration."""
        own = {name: getattr(self, name) for name in CHANGES}
        return own | {"trace": torch.stack(self.trace), "optimiser": self.optimiser.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name in CHANGES:
            setattr(self, name, state[name])
        self.trace = list(state["trace"])
        self.optimiser.restore(state["optimiser"])

    def _advance(self) -> None:
        rows, before, clock = self.optimiser.rows, self.optimiser.evaluations, time.perf_counter()
        self.optimiser.step()
        better = self.optimiser.loss < self.loss[rows]
        self.loss[rows[better]] = self.optimiser.loss[better]
        self.best[rows[better]] = self.optimiser.z[better]
        self.trace.append(self.loss.clone())
        self.iterations[rows] += 1
        self.evaluations[rows] += (self.optimiser.evaluations - before) // len(rows)
        share = (time.perf_counter() - clock) / len(rows)
        self.seconds.index_add_(
            0, self.problem.owner[rows], torch.full_like(rows, share, dtype=torch.float64)
        )

    def _halve(self) -> None:
        """Keep the better half (rounded up) of each victim's restarts that are still in the stack."""
        rows = self.optimiser.rows
        alive = torch.full_like(self.loss, torch.inf).index_copy_(0, rows, self.optimiser.loss)
        ranks = alive.view(self.victims, -1).argsort(1).argsort(1).flatten()[rows]
        owner = self.problem.owner[rows]
        count = torch.zeros(self.victims, dtype=torch.long, device=self.device)
        count.index_add_(0, owner, torch.ones_like(owner))
        self.optimiser.keep((ranks < (count[owner] + 1) // 2).nonzero()[:, 0])

    def _retire(self, step: int) -> None:
        """Take rows out that are matched, stalled or on a plateau, and rivals of a matched row; rows on a
        plateau of their schedule move on in it."""
        rows = self.optimiser.rows
        owner = self.problem.owner[rows]
        matched = self.loss[rows] <= self.spec.tolerance * self.scale[owner]
        solved = torch.zeros(self.victims, dtype=torch.bool, device=self.device)
        solved[owner[matched]] = True
        flat = self._flat(rows, step)
        early = flat & ~self.optimiser.settled
        self.optimiser.hasten(early)
        self.changed[rows[early]] = step
        plateau = (flat & self.optimiser.settled & ~early) | self.optimiser.finished
        stalled = self.optimiser.stalled
        for reason, mask in (("plateau", plateau), ("no descent left", stalled), ("matched", matched)):
            for v in owner[mask].tolist():
                self.notes[v] = reason
        gone = solved[owner] | plateau | stalled
        if gone.any():
            self.optimiser.keep((~gone).nonzero()[:, 0])

    def _flat(self, rows: Tensor, step: int) -> Tensor:
        """Which rows have gained next to nothing for a while, and since their schedule last moved on."""
        patience = self.spec.patience
        if not 0 < patience < step:
            return torch.zeros_like(rows, dtype=torch.bool)
        gained = self.loss[rows] <= (1 - PLATEAU_DECREASE) * self.trace[-1 - patience][rows]
        return ~gained & (step - self.changed[rows] >= patience)

    def _results(self) -> list[Reconstruction]:
        losses = self.loss.view(self.victims, -1)
        winner = losses.argmin(1)
        rows = torch.arange(self.victims, device=self.device) * self.spec.restarts + winner
        x, y = self.problem.decode(self.best[rows], rows)
        trace = torch.stack(self.trace)[:, rows].cpu()
        return [
            Reconstruction(
                x=x[v].detach(),
                y=y[v].detach() if y.dim() == 2 else y[v].detach().argmax(-1),
                loss=float(losses[v, winner[v]]),
                trace=trace[: int(self.iterations[rows[v]]) + 1, v],
                restart_losses=losses[v].cpu(),
                iterations=int(self.iterations[rows[v]]),
                evaluations=int(self.evaluations.view(self.victims, -1)[v].sum()),
                seconds=float(self.seconds[v]),
                note="; ".join(filter(None, (self.notes[v], self.problem.remark))),
            )
            for v in range(self.victims)
        ]


def _rungs(restarts: int) -> set[int]:
    """Iterations at which the stack is halved: 50, 150, 450, ... until one restart is left."""
    rungs, at, left = set(), FIRST_RUNG, restarts
    while left > 1:
        rungs.add(at)
        at, left = 3 * at, (left + 1) // 2
    return rungs
