"""The federation loop: rounds, accuracy, a checkpoint after each round, and someone looking on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fltoolkit.accounting import Rounds
from fltoolkit.algorithms.fedavg import fedavg, select_clients
from fltoolkit.defense import RoundContext
from fltoolkit.errors import InputError
from fltoolkit.metrics.interval import rate_interval
from fltoolkit.models import evaluating
from fltoolkit.report.files import write_atomic
from fltoolkit.training.round import Task
from fltoolkit.types import Examples, Layout, Transcript


@dataclass(frozen=True)
class RoundResult:
    """What is known after round `number` (counted from 1): the test accuracy and its 95 % interval."""

    number: int
    accuracy: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Federation:
    """K clients with their data, a task, a test set and the share C of clients that each round samples."""

    task: Task
    clients: Sequence[Examples]
    test: Examples
    fraction: float

    def cohort(self, number: int) -> list[int]:
        return select_clients(len(self.clients), self.fraction, self.task.seed, number)

    def events(self, rounds: int) -> Rounds:
        """The privacy events of rounds 1 to `rounds`, without running them."""
        return [self.task.stack.events(self._context(n)) for n in range(1, rounds + 1)]

    def _context(self, number: int) -> RoundContext:
        cohort = self.cohort(number)
        sizes = torch.tensor([float(len(self.clients[c])) for c in cohort])
        return RoundContext(self.task.seed, number, tuple(cohort), sizes / sizes.sum())


@dataclass(frozen=True)
class State:
    """Where a run stands: parameters `[D]` after the rounds in `history`."""

    params: Tensor
    history: tuple[RoundResult, ...] = field(default=())

    @property
    def round(self) -> int:
        return len(self.history)


def federate(
    federation: Federation, state: State, rounds: int, look: Callable[[Transcript], None] = lambda _: None
) -> Iterator[State]:
    """Go on from `state` to round `rounds`; yields the state after each. `look` is shown each transcript."""
    numbers = range(state.round + 1, rounds + 1)
    steps = fedavg(federation.task, state.params, federation.clients, federation.fraction, numbers)
    for number, (transcript, params) in zip(numbers, steps, strict=True):
        look(transcript)
        correct = count_correct(federation.task, params, federation.test)
        rate = rate_interval(correct, len(federation.test))
        low, high = rate["ci95"]
        state = State(params, (*state.history, RoundResult(number, rate["value"], (low, high))))
        yield state


def count_correct(task: Task, params: Tensor, test: Examples, batch: int = 2000) -> int:
    """Test examples whose largest logit is the label's, in evaluation mode."""
    weights = Layout.of(task.model).unflatten(params)
    with evaluating(task.model), torch.no_grad():
        return sum(
            int((functional_call(task.model, weights, (x,)).argmax(-1) == y).sum())
            for x, y in zip(test.x.split(batch), test.y.split(batch), strict=True)
        )


def save(path: Path, state: State, config: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all. config: plain values that a resumed run must share."""
    history = [(r.number, r.accuracy, *r.ci95) for r in state.history]
    content = {"params": state.params.cpu(), "history": history, "config": config}
    write_atomic(path, lambda p: torch.save(content, p))


def resume(path: Path, config: dict[str, Any]) -> State:
    """Read a checkpoint; raises InputError where it is unreadable or comes from another configuration."""
    try:
        content = torch.load(path, weights_only=True)
        history = tuple(RoundResult(n, a, (low, high)) for n, a, low, high in content["history"])
        saved, params = content["config"], content["params"]
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, UnpicklingError) as e:
        raise InputError(f"checkpoint must be one that `train` wrote, got {str(path)!r}") from e
    for key in config:
        if saved.get(key) != config[key]:
            raise InputError(
                f"{key} must be {saved.get(key)!r} as in the checkpoint {str(path)!r}, got {config[key]!r}"
            )
    return State(params, history)
