"""One training of a grid: accuracy, ε, bytes and seconds, and the states before the rounds to attack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fltoolkit.accounting import epsilon_by_view
from fltoolkit.errors import InputError
from fltoolkit.metrics.traffic import Traffic, plain_traffic
from fltoolkit.report.document import finite
from fltoolkit.report.files import write_atomic
from fltoolkit.training import federation as fed
from fltoolkit.training.budget import Budget
from fltoolkit.training.recipe import Kitchen, Recipe
from fltoolkit.training.round import Outcome, run_round

if TYPE_CHECKING:
    from fltoolkit.tradeoff.jobs import Training

SAVE_SECONDS = 2.0
"""Rounds that take longer are each kept; of shorter ones a killed job loses as much."""

States = dict[str, Any]
"""By number of round: the parameters `[D]` before it, and what defenses remembered."""


@lru_cache(maxsize=4)
def kitchen(recipe: Recipe) -> Kitchen:
    """The data of a recipe, loaded once a process."""
    return Kitchen(recipe)


def train(job: Training, scratch: Path | None) -> tuple[dict[str, Any], States]:
    """Train to the end. Raises InputError where it breaks down, as when every client diverges."""
    federation = kitchen(job.recipe).federation(job.stack)
    run = _Run(job, federation, scratch)
    for step in fed.federate(federation, run.state, job.rounds):
        run.after(step)
    test = run.state.evaluated[-1][1]
    rounds = federation.events(run.state.history)
    budget = Budget(federation.task.stack.hides_messages, job.delta, rounds=list(rounds))
    numbers = {
        "accuracy": {"value": test.accuracy, "ci95": list(test.ci95), "n": test.total},
        "rounds": run.state.round,
        "clients": len(federation.clients),
        "epsilon": epsilon(budget),
        "bytes": run.bytes(federation),
        "seconds": median(run.seconds) if run.seconds else None,
    }
    run.forget()
    return numbers, run.states


def epsilon(budget: Budget) -> dict[str, Any]:
    """By unit: ε of each view, and of a message that loses what hides it ("exposed"); None is ∞."""
    found = {}
    for unit, views in budget.spent().items():
        alone = epsilon_by_view(budget.rounds, False, budget.delta, unit)["message"]
        found[unit] = {k: finite(v) for k, v in {**views, "exposed": alone}.items()}
    return found


def placed(state: Mapping[str, Any], device: str) -> dict[str, Any]:
    """A kept state, on the device that trains."""
    memory = {k: v.to(device) for k, v in state["memory"].items()}
    return {"params": state["params"].to(device), "memory": memory}


def replay(federation: fed.Federation, state: Mapping[str, Any], number: int) -> Outcome:
    """Round `number` as it happened, with somebody looking on."""
    return run_round(
        federation.task,
        state["params"],
        federation.cohort(number),
        federation.clients,
        number,
        sampling=federation.chosen,
        memory=state["memory"],
    )


class _Run:
    """What a training gathers while it goes on, and where a killed one is found again."""

    def __init__(self, job: Training, federation: fed.Federation, scratch: Path | None) -> None:
        self.job, self.scratch = job, scratch
        self.checkpoint = None if scratch is None else scratch / f"{job.id}.checkpoint"
        self.config = {"job": job.id}
        self.state = fed.State(federation.task.layout.row(federation.task.model))
        self.states: States = {}
        self.seconds: list[float] = []
        self.traffic: list[Traffic] = []
        self.saved = time.monotonic()
        if self.checkpoint is not None and self.checkpoint.exists():
            self._resume(self.checkpoint)
        self._keep()

    def after(self, step: fed.Progressed) -> None:
        self.state = step.state
        self.seconds.append(step.seconds)
        if step.outcome.traffic is not None:
            self.traffic.append(step.outcome.traffic)
        self._keep()
        if self.checkpoint is not None and time.monotonic() - self.saved > SAVE_SECONDS:
            self._save(self.checkpoint)

    def bytes(self, federation: fed.Federation) -> dict[str, float]:
        """Bytes of a client in a round, mean: of a secure sum's rounds, else of the rounds to attack."""
        found = self.traffic
        if not found:
            states = {int(n): placed(s, self.job.recipe.device) for n, s in self.states.items()}
            transcripts = [replay(federation, s, n).transcript for n, s in states.items()]
            found = [plain_traffic(t.messages) for t in transcripts if t is not None]
        if not found:
            raise InputError("rounds must come to an end, got none that did")
        return {way: sum(getattr(t, way) for t in found) / len(found) for way in ("up", "down")}

    def forget(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
            self._beside(self.checkpoint).unlink(missing_ok=True)

    def _keep(self) -> None:
        if self.state.round + 1 in self.job.attacked:
            memory: dict[Any, Tensor] = {k: v.clone().cpu() for k, v in self.state.memory.items()}
            kept = {"params": self.state.params.clone().cpu(), "memory": memory}
            self.states[str(self.state.round + 1)] = kept

    def _save(self, path: Path) -> None:
        beside = [self.states, self.seconds, [[t.up, t.down] for t in self.traffic]]
        write_atomic(self._beside(path), lambda p: torch.save(beside, p))
        fed.save(path, self.state, self.config)
        self.saved = time.monotonic()

    def _resume(self, path: Path) -> None:
        try:
            state = fed.resume(path, self.config)
            self.states, self.seconds, traffic = torch.load(self._beside(path), weights_only=True)
        except (InputError, OSError, RuntimeError, ValueError):
            return  # half written: the job begins anew
        kept = placed({"params": state.params, "memory": state.memory}, self.job.recipe.device)
        self.state = fed.State(kept["params"], state.history, kept["memory"])
        self.traffic = [Traffic(up, down) for up, down in traffic]

    @staticmethod
    def _beside(path: Path) -> Path:
        return path.with_suffix(".states")
