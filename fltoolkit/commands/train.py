"""`train`: FedAvg with progress, a curve, a checkpoint, and optionally an adversary looking on."""

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


@dataclass(frozen=True)
class TrainOptions:
    """The flags of `python -m fltoolkit train`."""

    data: str = flag("digits", "data set with a test part: digits, mnist, ...", "NAME")
    model: str = flag("mlp", "model: a known name, or module:function for your own", "NAME")
    partition: str = flag("iid", "how examples are dealt to clients: iid, or shards (2 a client)", "NAME")
    clients: int = flag(100, "clients K of the federation", "K")
    fraction: float = flag(0.1, "share C of the clients that each round samples, 0 to 1", "C")
    epochs: int = flag(5, "local epochs E", "E")
    batch: int | None = flag(
        10, "local batch size B, or inf for all of a client's data", "B", count_or_infinity
    )
    lr: float = flag(0.5, "local learning rate η", "LR")
    rounds: int = flag(30, "rounds of communication", "N")
    defense: tuple[str, ...] = flag(
        (),
        "a defense with its parameters, repeatable, applied in order; e.g. clip:norm=0.5",
        "NAME:key=value",
    )
    attack: str | None = flag(None, "an attack that looks on, e.g. idlg", "NAME[:key=value]")
    attack_every: int = flag(10, "rounds between two looks of the attack, the first at round 1", "N")
    threat: str = flag("server", "who is looking: server or aggregate", "NAME")
    delta: float = flag(1e-5, "δ at which ε is reported", "DELTA")
    seed: int = flag(0, "seed of all random streams, >= 0", "N")
    device: str = flag("cpu", "where to compute: cpu, cuda, cuda:1, ...", "NAME")
    out: str | None = flag(
        None, "folder for the report, curve and checkpoint (default: runs/train-TIME)", "DIR"
    )
    resume: bool = flag(False, "go on from the checkpoint in --out, if there is one")
    json: bool = flag(False, "print the report as one JSON object on stdout and nothing else there")


def run_train(o: TrainOptions) -> int:
    """Train, write the files, print accuracy per round. InputError where the flags are impossible."""
    from fltoolkit.report import terminal
    from fltoolkit.report.files import output_folder
    from fltoolkit.training import federation as fed
    from fltoolkit.types import Layout

    federation, data = _federation(o)
    spy = _spy(o, federation, data)
    folder = output_folder(o.out, "train")
    checkpoint = folder / "checkpoint.pt"
    skip = ("out", "resume", "json", "rounds", "attack", "attack_every", "threat", "delta", "device")
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(o).items() if k not in skip}
    state = fed.State(Layout.of(federation.task.model).row(federation.task.model))
    if o.resume and checkpoint.exists():
        state = fed.resume(checkpoint, config)
        state = fed.State(state.params.to(o.device), state.history)
    bar = terminal.Bar("round", every=2.0)
    for reached in fed.federate(federation, state, o.rounds, spy):
        state = reached
        fed.save(checkpoint, state, config)
        bar(state.round, o.rounds, f"test accuracy {state.history[-1].accuracy:.3f}")
    bar.close()
    report = _report(o, federation, state, spy)
    _write(folder, o, state, report, spy)
    print(_summary(report, folder, spy), file=sys.stderr if o.json else sys.stdout)
    if o.json:
        print(json.dumps(report, allow_nan=False))
    return 0


def _federation(o: TrainOptions) -> tuple[Federation, Dataset]:
    from fltoolkit import models, registry
    from fltoolkit.audit import check_device, check_local
    from fltoolkit.data import load
    from fltoolkit.data.partition import partition
    from fltoolkit.errors import InputError, require
    from fltoolkit.loss import cross_entropy
    from fltoolkit.rng import stream, torch_stream
    from fltoolkit.training.federation import Federation
    from fltoolkit.training.round import Task
    from fltoolkit.types import LocalSpec

    require(o.rounds >= 1, "rounds", ">= 1", o.rounds)
    require(o.clients >= 1, "clients", ">= 1", o.clients)
    require(0 <= o.fraction <= 1, "fraction", "between 0 and 1", o.fraction)
    require(o.attack_every >= 1, "attack_every", ">= 1", o.attack_every)
    require(0 < o.delta < 1, "delta", "between 0 and 1", o.delta)
    require(o.seed >= 0, "seed", ">= 0", o.seed)
    local = LocalSpec(o.epochs, o.batch, o.lr)
    check_local(local)
    check_device(o.device)
    stack = registry.make_stack(o.defense, max(round(o.fraction * o.clients), 1))
    data = load(o.data)
    if data.test is None:
        raise InputError(f"data must have a test part to train on, got {o.data!r}, which has none")
    shape, classes = data.input_shape, data.num_classes
    model = models.build(o.model, shape, classes, torch_stream(o.seed, "model")).to(o.device)
    models.check_fits(model, shape, classes)
    parts = partition(o.partition, data.train.y.numpy(), o.clients, stream(o.seed, "partition"))
    clients = [data.train.take(p).to(o.device) for p in parts]
    task = Task(model, cross_entropy, local, stack, o.seed)
    return Federation(task, clients, data.test.to(o.device), o.fraction), data


def _spy(o: TrainOptions, federation: Federation, data: Dataset) -> Spy:
    from fltoolkit import registry
    from fltoolkit.audit import make_threat
    from fltoolkit.training.spy import Spy

    attack = registry.make_attack(o.attack) if o.attack else None
    return Spy(attack, make_threat(o.threat), federation.task, data, o.attack_every)


def _report(o: TrainOptions, federation: Federation, state: State, spy: Spy) -> dict[str, Any]:
    from fltoolkit.accounting import epsilon_by_view
    from fltoolkit.report import document
    from fltoolkit.scoring import summarise

    stack = federation.task.stack
    epsilons = epsilon_by_view(federation.events(state.round), stack.hides_messages, o.delta)
    flags = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(o).items()}
    return {
        "schema": document.TRAIN_SCHEMA,
        "command": document.command_line(),
        "options": {k: v for k, v in flags.items() if k not in ("out", "resume", "json")},
        "defenses": [dict(d) for d in stack.public()],
        "accuracy": [{"round": r.number, "value": r.accuracy, "ci95": list(r.ci95)} for r in state.history],
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
        f"FedAvg on {o.data}, {o.model}: K={o.clients}, C={o.fraction:g}, E={o.epochs}, B={o.batch or '∞'}"
    )
    accuracy_figure(folder / "accuracy.png", state.history, title)
    if spy.seen:
        rounds = ", ".join(str(r) for r, _ in spy.seen)
        heading = f"{o.attack} on a live update, rounds {rounds} ({o.threat} view)"
        low, high = spy.data.input_range
        reconstruction_figure(folder / "reconstruction.png", [s for _, s in spy.seen], heading, high - low)


def _summary(report: dict[str, Any], folder: Path, spy: Spy) -> str:
    from fltoolkit.report.terminal import epsilon, interval, table

    every = max(1, len(report["accuracy"]) // 10)
    rows = [
        (str(a["round"]), f"{a['value']:.3f}{interval(a['ci95'], 3)}")
        for a in report["accuracy"]
        if a["round"] % every == 0 or a["round"] == 1
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
    lines.append("files: " + ", ".join(str(p) for p in sorted(folder.iterdir()) if p.is_file()))
    return "\n".join(lines)
