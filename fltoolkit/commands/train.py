"""`train`: FedAvg with progress, a curve, checkpoints, and optionally an adversary looking on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fltoolkit.options import count_or_infinity, flag

if TYPE_CHECKING:
    from fltoolkit.data import Dataset
    from fltoolkit.training.federation import Federation, State
    from fltoolkit.training.spy import Spy

ON_FAILURE = ("skip", "stop")
NOT_THE_RUN = frozenset(
    {
        *("out", "resume", "json", "rounds", "target", "attack", "attack_every", "threat", "delta", "device"),
        *("checkpoint_every", "engine"),
    }
)
"""Flags that may differ between a run and its resumption."""


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
    delta: float = flag(1e-5, "δ at which ε is reported", "DELTA")
    engine: str = flag("auto", "how a cohort trains: auto, batched, looped or vmapped", "NAME")
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
    from fltoolkit.report.files import output_folder

    _check(o)
    federation, data = _federation(o)
    spy = _spy(o, federation, data)
    folder = output_folder(o.out, "train")
    state = _train(o, federation, spy, folder)
    report = _report(o, federation, state, spy)
    _write(folder, o, state, report, spy)
    print(_summary(report, folder, spy), file=sys.stderr if o.json else sys.stdout)
    if o.json:
        print(json.dumps(report, allow_nan=False))
    return 0


def _train(o: TrainOptions, federation: Federation, spy: Spy, folder: Path) -> State:
    from fltoolkit.report import terminal
    from fltoolkit.training import federation as fed
    from fltoolkit.training.log import RoundLog

    checkpoint = folder / "checkpoint.pt"
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(o).items() if k not in NOT_THE_RUN}
    state = fed.State(federation.task.layout.row(federation.task.model))
    if o.resume and checkpoint.exists():
        state = fed.resume(checkpoint, config)
        state = fed.State(state.params.to(o.device), state.history)
    bar = terminal.Bar("round", every=2.0, start=state.round, ends=True)
    log = RoundLog(folder, state.round)
    saved = state
    for step in fed.federate(federation, state, o.rounds, spy):
        state = step.state
        log(step)
        for f in step.outcome.failures:
            print(f"round {state.round}: left out: client {f.client} {f.reason}", file=sys.stderr)
        if state.round % o.checkpoint_every == 0:
            fed.save(checkpoint, state, config)
            saved = state
        bar(state.round, o.rounds, f"test accuracy {_last_accuracy(state)}")
    bar.close()
    log.close()
    if saved is not state:
        fed.save(checkpoint, state, config)
    return state


def _last_accuracy(state: State) -> str:
    return f"{state.evaluated[-1][1].accuracy:.3f}" if state.evaluated else "not yet known"


def _check(o: TrainOptions) -> None:
    from fltoolkit.audit import check_device
    from fltoolkit.errors import require

    for name in ("rounds", "attack_every", "checkpoint_every"):
        require(getattr(o, name) >= 1, name, ">= 1", getattr(o, name))
    require(0 < o.delta < 1, "delta", "between 0 and 1", o.delta)
    require(0 < o.lr_decay <= 1, "lr_decay", "above 0 and at most 1", o.lr_decay)
    require(o.server_lr > 0, "server_lr", "> 0", o.server_lr)
    require(o.seed >= 0, "seed", ">= 0", o.seed)
    require(o.on_failure in ON_FAILURE, "on_failure", "skip or stop", o.on_failure)
    check_device(o.device)


def _federation(o: TrainOptions) -> tuple[Federation, Dataset]:
    from fltoolkit import models, registry
    from fltoolkit.audit import check_local
    from fltoolkit.data import load
    from fltoolkit.data.partition import partition
    from fltoolkit.errors import InputError
    from fltoolkit.loss import cross_entropy
    from fltoolkit.rng import stream, torch_stream
    from fltoolkit.training.clients import Dealt
    from fltoolkit.training.federation import Federation
    from fltoolkit.training.round import Task
    from fltoolkit.types import LocalSpec

    local = LocalSpec(o.epochs, o.batch, o.lr, o.momentum, o.weight_decay)
    check_local(local)
    registry.make_stack(o.defense)
    data = load(o.data)
    if data.test is None:
        raise InputError(f"data must have a test part to train on, got {o.data!r}, which has none")
    shape, classes = data.input_shape, data.num_classes
    model = models.build(o.model, shape, classes, torch_stream(o.seed, "model")).to(o.device)
    models.check_fits(model, shape, classes, data.tokens)
    parts = partition(
        o.partition, data.train.y.numpy(), o.clients, stream(o.seed, "partition"), data.client_ids
    )
    stack = registry.make_stack(o.defense, max(round(o.fraction * len(parts)), 1))
    clients = Dealt(data.train.to(o.device), parts)
    task = Task(
        model,
        cross_entropy,
        local,
        stack,
        o.seed,
        lr_decay=o.lr_decay,
        server_lr=o.server_lr,
        engine=o.engine,
        stop_on_failure=o.on_failure == "stop",
    )
    task.engine_for(shape)
    return Federation(task, clients, data.test.to(o.device), o.fraction, o.eval_every, o.target), data


def _spy(o: TrainOptions, federation: Federation, data: Dataset) -> Spy:
    from fltoolkit import registry
    from fltoolkit.audit import check_searchable, make_threat
    from fltoolkit.training.spy import Spy

    attack = registry.make_attack(o.attack) if o.attack else None
    if attack is not None:
        check_searchable(data)
    return Spy(attack, make_threat(o.threat), federation.task, data, o.attack_every)


def _report(o: TrainOptions, federation: Federation, state: State, spy: Spy) -> dict[str, Any]:
    from fltoolkit.accounting import epsilon_by_view
    from fltoolkit.report import document
    from fltoolkit.scoring import summarise

    stack = federation.task.stack
    epsilons = epsilon_by_view(federation.events(state.history), stack.hides_messages, o.delta)
    flags = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(o).items()}
    return {
        "schema": document.TRAIN_SCHEMA,
        "command": document.command_line(),
        "options": {k: v for k, v in flags.items() if k not in ("out", "resume", "json")},
        "clients": len(federation.clients),
        "note": spy.data.note,
        "engine": federation.task.engine_for(tuple(federation.test.x.shape[1:])).name,
        "defenses": [dict(d) for d in stack.public()],
        "rounds": state.round,
        "accuracy": [{"round": n, "value": t.accuracy, "ci95": list(t.ci95)} for n, t in state.evaluated],
        "target_reached": state.reached(o.target) if o.target is not None else None,
        "failed": {str(r.number): list(r.failed) for r in state.history if r.failed},
        "test_examples": len(federation.test),
        "epsilon": {k: document.finite(v) for k, v in epsilons.items()}
        | {"delta": o.delta, "unit": "client", "adjacency": "zero-out"},
        "leakage": [{"round": r, "metrics": summarise([s], 30.0)} for r, s in spy.seen],
        "versions": document.versions(),
    }


def _write(folder: Path, o: TrainOptions, state: State, report: dict[str, Any], spy: Spy) -> None:
    from fltoolkit.report.figures import accuracy_figure, reconstruction_figure
    from fltoolkit.report.files import write_json

    write_json(folder / "report.json", report)
    title = (
        f"FedAvg on {o.data}, {o.model}: K={report['clients']}, C={o.fraction:g}, "
        f"E={o.epochs}, B={o.batch or '∞'}"
    )
    accuracy_figure(folder / "accuracy.png", state.evaluated, title)
    if spy.seen:
        rounds = ", ".join(str(r) for r, _ in spy.seen)
        heading = f"{o.attack} on a live update, rounds {rounds} ({o.threat} view)"
        low, high = spy.data.input_range
        reconstruction_figure(folder / "reconstruction.png", [s for _, s in spy.seen], heading, high - low)


def _summary(report: dict[str, Any], folder: Path, spy: Spy) -> str:
    from fltoolkit.report.terminal import epsilon, interval, table

    accuracy = report["accuracy"]
    every = max(1, len(accuracy) // 10)
    rows = [
        (str(a["round"]), f"{a['value']:.3f}{interval(a['ci95'], 3)}")
        for i, a in enumerate(accuracy)
        if i in (0, len(accuracy) - 1) or (i + 1) % every == 0
    ]
    lines = [table(("round", "test accuracy"), rows)]
    for r, s in spy.seen:
        lines.append(
            f"round {r}: the adversary recovers a batch of {len(s.truth)} "
            f"at PSNR {float(s.psnr.mean()):.2f} dB "
            f"({float(s.gain.mean()):+.2f} over a trivial guess), labels {s.labels:.0%}"
        )
    e = report["epsilon"]
    lines.append(
        f"ε of messages {epsilon(e['message'])}, of the aggregates {epsilon(e['aggregate'])} "
        f"at δ = {e['delta']:g} (all rounds, per client)"
    )
    if report["note"]:
        lines.append(f"note: {report['note']}")
    lines.append("files: " + ", ".join(str(p) for p in sorted(folder.iterdir()) if p.is_file()))
    return "\n".join(lines)
