"""The search that DLG and its kin share: start several guesses a victim, drop the hopeless, polish the rest.

All victims × restarts descend together. At fixed iterations the worse half of every victim's restarts
is dropped, by matching loss alone (successive halving; Jamieson and Talwalkar 2016, arXiv:1502.07943,
Algorithm 1), and a victim leaves the stack once its gradient is matched or nothing more is gained, so
that easy victims cost little.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fltoolkit.attack import Progress
from fltoolkit.inversion.lbfgs import LBFGS
from fltoolkit.inversion.matching import GradientMatching
from fltoolkit.types import Observation, Reconstruction

FIRST_RUNG = 50
CHECK_EVERY = 25
PLATEAU_WINDOW = 200
PLATEAU_DECREASE = 0.02
GROUP_FLOATS = 4e8
"""Victims share a stack as long as their L-BFGS histories hold at most this many numbers."""


class SearchSpec(Protocol):
    """The options of a search; `GradientInversion` documents them."""

    @property
    def steps(self) -> int: ...
    @property
    def restarts(self) -> int: ...
    @property
    def history(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def start_std(self) -> float: ...


def search(
    observations: Sequence[Observation],
    rngs: Sequence[torch.Generator],
    labels: Tensor | None,
    spec: SearchSpec,
    progress: Progress,
) -> list[Reconstruction]:
    """Reconstruct every victim's batch; labels `[V, N]` where known, else None and they are searched too."""
    probe = GradientMatching(observations[:1], torch.zeros(1, dtype=torch.long), labels)
    size = max(1, int(GROUP_FLOATS / (2 * spec.history * probe.variables * spec.restarts)))
    found: list[Reconstruction] = []
    for i in range(0, len(observations), size):
        part = slice(i, i + size)
        group = _Group(observations[part], rngs[part], None if labels is None else labels[part], spec)
        found += group.run(progress)
    return found


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
        self.problem = GradientMatching(observations, owner, labels)
        low, high = observations[0].input_range
        starts = [_start(self.problem, spec, rng, low, high) for rng in rngs]
        self.begun = time.perf_counter()
        self.optimiser = LBFGS(self.problem, torch.cat(starts).to(self.device), spec.history)
        self.best = self.optimiser.z.clone()
        self.loss = self.optimiser.loss.clone()
        self.trace: list[Tensor] = [self.loss.clone()]
        self.evaluations = torch.ones_like(owner)
        self.iterations = torch.zeros_like(owner)
        self.seconds = torch.zeros(self.victims, dtype=torch.float64, device=self.device)
        self.notes = ["stopped at the last allowed iteration"] * self.victims

    def run(self, progress: Progress) -> list[Reconstruction]:
        rungs = _rungs(self.spec.restarts)
        for step in range(1, self.spec.steps + 1):
            self._advance()
            if step in rungs:
                self._halve()
            if step % CHECK_EVERY == 0 or step == self.spec.steps:
                self._retire(step)
                best = self.loss.view(self.victims, -1).min(1).values
                active = len(self.optimiser.rows)
                text = f"matching loss median {best.median():.3g}, worst {best.max():.3g}, {active} active"
                progress(step, self.spec.steps, text)
            if len(self.optimiser.rows) == 0:
                break
        return self._results()

    def _advance(self) -> None:
        rows, before, clock = self.optimiser.rows, self.optimiser.evaluations, time.perf_counter()
        self.optimiser.step()
        self.loss[rows], self.best[rows] = self.optimiser.loss, self.optimiser.z
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
        """Take rows out that are matched, stalled or on a plateau, and rivals of a matched row."""
        rows, loss = self.optimiser.rows, self.optimiser.loss
        owner = self.problem.owner[rows]
        limit = self.spec.tolerance * self.problem.scale[owner]
        matched = loss <= limit
        solved = torch.zeros(self.victims, dtype=torch.bool, device=self.device)
        solved[owner[matched]] = True
        plateau = torch.zeros_like(matched)
        if step > PLATEAU_WINDOW:
            plateau = loss > (1 - PLATEAU_DECREASE) * self.trace[-1 - PLATEAU_WINDOW][rows]
        stalled = self.optimiser.stalled
        for reason, mask in (("plateau", plateau), ("no descent left", stalled), ("matched", matched)):
            for v in owner[mask].tolist():
                self.notes[v] = reason
        gone = solved[owner] | plateau | stalled
        if gone.any():
            self.optimiser.keep((~gone).nonzero()[:, 0])

    def _results(self) -> list[Reconstruction]:
        losses = self.loss.view(self.victims, -1)
        winner = losses.argmin(1)
        rows = torch.arange(self.victims, device=self.device) * self.spec.restarts + winner
        x, y = self.problem.decode(self.best[rows], self.problem.owner[rows])
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
                note=self.notes[v],
            )
            for v in range(self.victims)
        ]


def _start(
    problem: GradientMatching, spec: SearchSpec, rng: torch.Generator, low: float, high: float
) -> Tensor:
    """R random guesses of a victim `[R, n]`: normal around the middle of the range, label logits N(0, 1)."""
    z = torch.randn(spec.restarts, problem.variables, generator=rng)
    inputs = problem.inputs
    z[:, :inputs] = 0.5 * (low + high) + spec.start_std * (high - low) * z[:, :inputs]
    return z


def _rungs(restarts: int) -> set[int]:
    """Iterations at which the stack is halved: 50, 150, 450, ... until one restart is left."""
    rungs, at, left = set(), FIRST_RUNG, restarts
    while left > 1:
        rungs.add(at)
        at, left = 3 * at, (left + 1) // 2
    return rungs
