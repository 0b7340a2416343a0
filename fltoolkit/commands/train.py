"""`train`: FedAvg with progress, a curve, checkpoints, and optionally an adversary looking on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from fltoolkit.options import count_or_infinity, flag

if TYPE_CHECKING:
    from fltoolkit.data import Dataset
    from fltoolkit.training.budget import Budget
    from fltoolkit.training.federation import Federation, State
    from fltoolkit.training.spy import Spy

NOT_THE_RUN = frozenset(
    {
        *("out", "resume", "json", "rounds", "target", "attack", "attack_every", "threat", "delta", "device"),
        *("checkpoint_every", "engine", "epsilon_budget"),
    }
)
"""Flags that may differ between a run and its resumption; rounds and delta not where ε sets the noise."""

LOOKS = "looks.pt"
NORMS = (
    "warning: FedAvg averages parameters alone here, so BatchNorm's running statistics, by which the test "
    "set is normalised, stay as they began; GroupNorm has none"
)


@dataclass(frozen=True)
class TrainOptions:
    """The flags of `python -m fltoolkit train`."""

    data: str = flag("digits", "data set with a test part: digits, mnist, ...", "NAME")
    model: str = flag("mlp", "model: a known name, or module:function for your own", "NAME")
    partition: str = flag(
        "iid", "how examples are dealt to clients, e.g. iid, shards, dirichlet:alpha=0.5", "NAME[:key=value]"
    )
    clients: int | None = flag(
        None, "clients K of the federation (default: 100, or those that the data comes from)", "K", int
    )
    fraction: float = flag(0.1, "share C of the clients that each round samples, 0 to 1", "C")
    epochs: int = flag(5, "local epochs E", "E")
    batch: int | None = flag(
        10, "local batch size B, or inf for all of a client's data", "B", count_or_infinity
    )
    lr: float = flag(0.5, "local learning rate η", "LR")
    lr_decay: float = flag(1.0, "factor on η from each round to the next, above 0 and at most 1", "F")
    momentum: float = flag(0.0, "local momentum μ, 0 to below 1, from zero in each round", "MU")
    weight_decay: float = flag(0.0, "local weight decay λ, >= 0", "LAMBDA")
    shuffle_buffer: int | None = flag(
        None, "examples in the buffer that a client draws its batches from (default: all it has)", "N", int
    )
    precision: str = flag(
        "float32", "of clients' products and the evaluation's: float32, or bf16 where that is faster", "NAME"
    )
    server_lr: float = flag(1.0, "server learning rate on the aggregated difference, > 0", "LR")
    rounds: int = flag(30, "rounds of communication", "N")
    target: float | None = flag(None, "stop once the test accuracy reaches this, 0 to 1", "ACC", float)
    eval_every: int = flag(1, "rounds between two evaluations on the test set", "N")
    defense: tuple[str, ...] = flag(
        (),
        "a defense with its parameters, repeatable, applied in order; e.g. clip:norm=0.5",
        "NAME:key=value",
    )
    attack: str | None = flag(None, "an attack that looks on, e.g. idlg", "NAME[:key=value]")
    attack_every: int = flag(10, "rounds between two looks of the attack, the first at round 1", "N")
    threat: str = flag("server", "who is looking: server or aggregate", "NAME")
    equal_weights: bool = flag(False, "every client counts alike in the mean, not by its examples")
    sampling: str = flag("fixed", "how a round chooses clients: fixed (max(C·K, 1)) or poisson", "NAME")
    delta: float = flag(1e-5, "δ at which ε is reported", "DELTA")
    epsilon: float | None = flag(
        None, "find the noise multiplier with which all rounds together cost this ε", "EPSILON", float
    )
    epsilon_budget: float | None = flag(
        None, "stop before the round that would cost more than this ε", "EPSILON", float
    )
    engine: str = flag(
        "auto",
        "auto, compiled, batched, looped, vmapped or graphed; opacus for defenses on examples",
        "NAME",
    )
    on_failure: str = flag("skip", "when a client fails or sends NaN: skip it, or stop", "skip|stop")
    seed: int = flag(0, "seed of all random streams, >= 0", "N")
    device: str = flag("cpu", "where to compute: cpu, cuda, cuda:1, ...", "NAME")
    out: str | None = flag(
        None, "folder for the report, curve and checkpoint (default: runs/train-TIME)", "DIR"
    )
    checkpoint_every: int = flag(1, "rounds between two checkpoints", "N")
    resume: bool = flag(False, "go on from the checkpoint in --out, if there is one")
    json: bool = flag(False, "print the report as one JSON object on stdout and nothing else there")


def run_train(o: TrainOptions) -> int:
    """Train, write the files, print accuracy per round. InputError where the flags are impossible."""
    from fltoolkit.commands.train_report import report_of, summary, write
    from fltoolkit.report.files import output_folder
    from fltoolkit.training.buffers import norms_in_training

    _check(o)
    federation, data = _federation(o)
    if norms_in_training(federation.task.model):
        print(NORMS, file=sys.stderr)
    budget = _budget(o, federation)
    spy = _spy(o, federation, data)
    folder = output_folder(o.out, "train")
    state = _train(o, federation, spy, folder, budget)
    report = report_of(o, federation, state, spy, budget)
    write(folder, o, state, report, spy)
    print(summary(report, folder, spy), file=sys.stderr if o.json else sys.stdout)
    if o.json:
        print(json.dumps(report, allow_nan=False))
    return 0


def _train(o: TrainOptions, federation: Federation, spy: Spy, folder: Path, budget: Budget) -> State:
    from fltoolkit.report import terminal
    from fltoolkit.report.epsilon import by_round
    from fltoolkit.training import federation as fed
    from fltoolkit.training.log import RoundLog

    checkpoint = folder / "checkpoint.pt"
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(o).items() if k not in NOT_THE_RUN}
    if o.epsilon is not None:  # the noise is calibrated to these
        config |= {"rounds": o.rounds, "delta": o.delta}
    state = fed.State(federation.task.layout.row(federation.task.model))
    if o.resume and checkpoint.exists():
        state = fed.resume(checkpoint, config)
        memory = {k: v.to(o.device) for k, v in state.memory.items()}
        state = replace(state, params=state.params.to(o.device), memory=memory)
        budget.rounds += federation.events(state.history)
        spy.restore(folder / LOOKS, f"{o.attack} {o.threat}", state.round)
    bar = terminal.Bar("round", every=2.0, start=state.round, ends=True)
    log = RoundLog(folder, state.round)
    saved = state

    def save() -> None:
        spy.save(folder / LOOKS, f"{o.attack} {o.threat}")
        fed.save(checkpoint, state, config)

    for step in fed.federate(federation, state, o.rounds, spy, budget):
        state = step.state
        log(step, by_round(budget))
        for f in step.outcome.failures:
            print(f"round {state.round}: left out: client {f.client} {f.reason}", file=sys.stderr)
        if state.round % o.checkpoint_every == 0:
            save()
            saved = state
        bar(state.round, o.rounds, f"test accuracy {_last_accuracy(state)}")
    bar.close()
    log.close()
    if saved is not state:
        save()
    return state


def _last_accuracy(state: State) -> str:
    return f"{state.evaluated[-1][1].accuracy:.3f}" if state.evaluated else "not yet known"


def _check(o: TrainOptions) -> None:
    from fltoolkit.errors import require

    for name in ("rounds", "attack_every", "checkpoint_every"):
        require(getattr(o, name) >= 1, name, ">= 1", getattr(o, name))
    require(0 < o.delta < 1, "delta", "between 0 and 1", o.delta)
    for name in ("epsilon", "epsilon_budget"):
        value = getattr(o, name)
        require(value is None or 0 < value < inf, name, "a finite number > 0", value)


def _federation(o: TrainOptions) -> tuple[Federation, Dataset]:
    from fltoolkit import registry
    from fltoolkit.training.budget import calibrated
    from fltoolkit.training.recipe import Kitchen, Recipe

    named = registry.make_stack(o.defense).all
    kitchen = Kitchen(Recipe.of(o))
    found = kitchen.federation(named)
    if o.epsilon is not None:
        found = kitchen.federation(calibrated(named, kitchen.federation, o.rounds, o.epsilon, o.delta))
    found.task.check(kitchen.data.input_shape)
    return found, kitchen.data


def _budget(o: TrainOptions, federation: Federation) -> Budget:
    from fltoolkit.errors import InputError, require
    from fltoolkit.training.budget import Budget

    budget = Budget(federation.task.stack.hides_messages, o.delta, o.epsilon_budget or inf)
    rounds = (federation.events_of(n) for n in range(1, o.rounds + 1))
    first = budget.spent([next((events for events in rounds if events), ())])
    if o.epsilon_budget is not None:
        if not any(e < inf for views in first.values() for e in views.values()):
            raise InputError("epsilon_budget must come with a defense that has an ε, got none")
        cost = budget.largest(first)
        require(cost <= budget.limit, "epsilon_budget", f"at least {cost:.4g}, a round's ε", budget.limit)
    counts = {"client": len(federation.clients), "example": sum(map(len, federation.clients))}
    for unit in first:
        if o.delta >= 1 / counts[unit]:
            text = (
                f"delta {o.delta:g} is not below 1 / {counts[unit]} {unit}s: publishing one of them would do"
            )
            print(f"warning: {text}", file=sys.stderr)
    return budget


def _spy(o: TrainOptions, federation: Federation, data: Dataset) -> Spy:
    from fltoolkit import registry
    from fltoolkit.audit import make_threat
    from fltoolkit.checks import check_searchable
    from fltoolkit.training.spy import Spy

    attack = registry.make_attack(o.attack) if o.attack else None
    if attack is not None:
        check_searchable(data)
    return Spy(attack, make_threat(o.threat), federation.task, data, o.attack_every)
