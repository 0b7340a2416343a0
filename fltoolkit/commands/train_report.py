"""What a finished `train` leaves behind: its report, its pictures and the lines that it prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fltoolkit.commands.train import TrainOptions
from fltoolkit.report import document
from fltoolkit.report.epsilon import epsilon_lines, epsilons
from fltoolkit.report.figures import accuracy_figure, reconstruction_figure
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import interval, table
from fltoolkit.scoring import summarise
from fltoolkit.training.budget import Budget
from fltoolkit.training.federation import Federation, State
from fltoolkit.training.spy import Spy


def report_of(
    o: TrainOptions, federation: Federation, state: State, spy: Spy, budget: Budget
) -> dict[str, Any]:
    """What report.json holds of a finished run."""
    stack = federation.task.stack
    ended = "budget" if state.round < o.rounds and not state.reached(o.target) else "done"
    flags = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(o).items()}
    return {
        "schema": document.TRAIN_SCHEMA,
        "command": document.command_line(),
        "options": {k: v for k, v in flags.items() if k not in ("out", "resume", "json")},
        "clients": len(federation.clients),
        "note": spy.data.note,
        "engine": federation.task.engine_name(tuple(federation.test.x.shape[1:])),
        "defenses": [dict(d) for d in stack.public()],
        "rounds": state.round,
        "accuracy": [{"round": n, "value": t.accuracy, "ci95": list(t.ci95)} for n, t in state.evaluated],
        "target_reached": state.reached(o.target) if o.target is not None else None,
        "failed": {str(r.number): list(r.failed) for r in state.history if r.failed},
        "test_examples": len(federation.test),
        "ended": ended,
        "epsilon": epsilons(budget),
        "leakage": [{"round": r, "metrics": summarise([s], 30.0)} for r, s in spy.seen],
        "versions": document.versions(),
    }


def write(folder: Path, o: TrainOptions, state: State, report: dict[str, Any], spy: Spy) -> None:
    """The report and the pictures."""
    write_json(folder / "report.json", report)
    title = (
        f"FedAvg on {o.data}, {o.model}: K={report['clients']}, C={o.fraction:g}, "
        f"E={o.epochs}, B={o.batch or '∞'}"
    )
    accuracy_figure(folder / "accuracy.png", state.evaluated, title)
    if spy.seen:
        rounds = ", ".join(str(r) for r, _ in spy.seen)
        heading = f"{o.attack} on a live update, rounds {rounds} ({o.threat} view)"
        seen = [s for _, s in spy.seen]
        reconstruction_figure(folder / "reconstruction.png", seen, heading, spy.data.input_range)


def summary(report: dict[str, Any], folder: Path, spy: Spy) -> str:
    """What the command prints in the end."""
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
    lines += epsilon_lines(report["epsilon"], "all rounds")
    if report["ended"] == "budget":
        lines.append(f"stopped after round {report['rounds']}: the next would exceed the budget")
    if report["note"]:
        lines.append(f"note: {report['note']}")
    lines.append("files: " + ", ".join(str(p) for p in sorted(folder.iterdir()) if p.is_file()))
    return "\n".join(lines)
