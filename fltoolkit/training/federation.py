"""The federation loop: rounds, accuracy, checkpoints, and someone looking on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from math import inf
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fltoolkit.accounting import Rounds
from fltoolkit.algorithms.fedavg import cohort_sampling, fedavg, select_clients
from fltoolkit.defense import Local, RoundContext, Sampling
from fltoolkit.errors import InputError, require
from fltoolkit.report.files import write_atomic
from fltoolkit.training.budget import Budget
from fltoolkit.training.evaluate import Evaluation, evaluate
from fltoolkit.training.round import Memory, Outcome
from fltoolkit.training.task import Task, counts, round_events
from fltoolkit.types import Examples, PrivacyEvent, Transcript

KINDS = ("fixed", "poisson")
"""How a round's cohort can be chosen."""


@dataclass(frozen=True)
class RoundResult:
    """What is kept of round `number` (counted from 1): the test result, where the round was evaluated, and
    the clients that failed."""

    number: int
    test: Evaluation | None
    failed: tuple[int, ...] = ()


class Witness(Protocol):
    """Somebody who looks on while a federation trains."""

    def wants(self, number: int) -> bool:
        """Whether it looks at round `number`."""

    def __call__(self, transcript: Transcript) -> None: ...


@dataclass(frozen=True)
class Federation:
    """K clients with their data, a task, a test set and the share C of clients that each round samples.

    sampling: how: "fixed", max(round(C·K), 1) of them without replacement, or "poisson", each by itself with
    probability C. eval_every: rounds between two evaluations; the last round is always evaluated. target: the
    test accuracy at which training stops (None: never).
    """

    task: Task
    clients: Sequence[Examples]
    test: Examples
    fraction: float
    eval_every: int = 1
    target: float | None = None
    sampling: str = "fixed"

    def __post_init__(self) -> None:
        require(0 <= self.fraction <= 1, "fraction", "between 0 and 1", self.fraction)
        require(self.eval_every >= 1, "eval_every", ">= 1", self.eval_every)
        good = self.target is None or 0 < self.target <= 1
        require(good, "target", "an accuracy above 0 and at most 1", self.target)
        require(self.sampling in KINDS, "sampling", f"one of {KINDS}", self.sampling)
        some = self.fraction > 0 or self.sampling != "poisson"
        require(some, "fraction", "above 0 with sampling 'poisson'", self.fraction)

    @cached_property
    def chosen(self) -> Sampling:
        """How cohorts are chosen, as the accounting must know it."""
        return cohort_sampling(self.task, self.clients, self.fraction, self.sampling)

    def cohort(self, number: int) -> list[int]:
        return select_clients(len(self.clients), self.fraction, self.task.seed, number, self.sampling)

    def events(self, history: Sequence[RoundResult]) -> Rounds:
        """The privacy events of the rounds in `history`, without running them again."""
        return [self.events_of(r.number, r.failed) for r in history]

    def events_of(self, number: int, failed: Sequence[int] = ()) -> tuple[PrivacyEvent, ...]:
        """The privacy events of round `number`, in which the clients `failed` fail; those of all, where all
        do, as when a secure sum is given up."""
        everybody = self.cohort(number)
        cohort = [c for c in everybody if c not in failed] or everybody
        if not failed:  # who drops out by chance can be told beforehand
            keep = self.task.stack.survivors(self._context(number, cohort))
            cohort = [cohort[i] for i in keep]
        return round_events(self.task, self._context(number, cohort), [len(self.clients[c]) for c in cohort])

    def _context(self, number: int, cohort: Sequence[int]) -> RoundContext:
        sizes = [len(self.clients[c]) for c in cohort]
        sampling = self.chosen
        n = counts(self.task, sampling, sizes)
        poisson = sampling.kind == "poisson"
        weights = n / (sampling.rate * sampling.population if poisson else n.sum())
        local = Local(self.task.model, torch.empty(0), self.task.loss, self.task.layout)
        return RoundContext(self.task.seed, number, tuple(cohort), weights, sampling=sampling, local=local)


@dataclass(frozen=True)
class State:
    """Where a run stands: parameters `[D]` after the rounds in `history`, the seconds that these took, and
    what defenses remember."""

    params: Tensor
    history: tuple[RoundResult, ...] = field(default=())
    memory: Memory = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def round(self) -> int:
        return len(self.history)

    @property
    def evaluated(self) -> tuple[tuple[int, Evaluation], ...]:
        return tuple((r.number, r.test) for r in self.history if r.test is not None)

    def reached(self, target: float | None) -> bool:
        return target is not None and any(e.accuracy >= target for _, e in self.evaluated)


@dataclass(frozen=True)
class Progressed:
    """A run after one more round: its state, what the round left behind, and the seconds it took."""

    state: State
    outcome: Outcome
    seconds: float


def federate(
    federation: Federation,
    state: State,
    rounds: int,
    witness: Witness | None = None,
    budget: Budget | None = None,
) -> Iterator[Progressed]:
    """Go on from `state` to round `rounds` or to the target; yields after each round. `witness` is shown
    the transcripts that it wants. A `budget` ends the run before the round that would exceed it."""
    if state.reached(federation.target):
        return
    numbers = takewhile(lambda n: _allowed(federation, n, budget), range(state.round + 1, rounds + 1))
    wants = witness.wants if witness is not None else lambda _: False
    f = federation
    steps = fedavg(f.task, state.params, f.clients, f.fraction, numbers, wants, f.sampling, state.memory)
    begun = time.perf_counter()
    for outcome, params in steps:
        if budget is not None:
            budget.spend(outcome.events)
        if witness is not None and outcome.transcript is not None:
            witness(outcome.transcript)
        test = None
        last = outcome.number == rounds or not _allowed(f, outcome.number + 1, budget)
        if last or outcome.number % f.eval_every == 0:
            test = evaluate(federation.task, params, federation.test)
        failed = tuple(f.client for f in outcome.failures)
        history = (*state.history, RoundResult(outcome.number, test, failed))
        seconds = time.perf_counter() - begun
        state = State(params, history, outcome.memory, state.seconds + seconds)
        yield Progressed(state, outcome, seconds)
        if test is not None and federation.target is not None and test.accuracy >= federation.target:
            return
        begun = time.perf_counter()


def _allowed(federation: Federation, number: int, budget: Budget | None) -> bool:
    """Whether the budget leaves room for round `number`."""
    return budget is None or budget.limit == inf or budget.allows(federation.events_of(number))


def save(path: Path, state: State, config: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all. config: plain values that a resumed run must share."""
    history = [
        (r.number, r.test and (r.test.correct, r.test.total, r.test.loss), r.failed) for r in state.history
    ]
    memory = {key: value.cpu() for key, value in state.memory.items()}
    content = {"params": state.params.cpu(), "history": history, "memory": memory, "seconds": state.seconds}
    write_atomic(path, lambda p: torch.save({**content, "config": config}, p))


def resume(path: Path, config: dict[str, Any]) -> State:
    """Read a checkpoint; raises InputError where it is unreadable or comes from another configuration."""
    try:
        content = torch.load(path, weights_only=True)
        history = tuple(
            RoundResult(n, test and Evaluation(*test), tuple(failed))
            for n, test, failed in content["history"]
        )
        saved = dict(content["config"])
        state = State(content["params"], history, content["memory"], content["seconds"])
    except Exception as e:  # by where the file is broken
        raise InputError(f"checkpoint must be one that `train` wrote, got {str(path)!r}") from e
    check_same(path, saved, config)
    return state


def check_same(path: Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises InputError where what was `saved` in `path` is of another configuration."""
    for key in config:
        if saved.get(key) != config[key]:
            raise InputError(f"{key} must be {saved.get(key)!r} as in {str(path)!r}, got {config[key]!r}")
