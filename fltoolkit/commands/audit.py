"""`audit`: one attack on one scene; also what `python -m attacks.NAME` runs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fltoolkit.options import count_or_infinity, flag


@dataclass(frozen=True)
class AuditOptions:
    """The flags that every attack shares."""

    data: str = flag("photos", "data set: photos, digits, mnist, ... or folder:PATH", "NAME")
    model: str = flag("lenet", "model: a known name, or module:function for your own", "NAME")
    batch: int = flag(1, "private examples of each client", "N")
    victims: int = flag(1, "independent victims, other images and another initialisation each", "N")
    restarts: int | None = flag(None, "random starts a victim, ranked by matching loss", "R", int)
    clients: int | None = flag(
        None, "clients K that the round mixes (default: 1, or what secagg:clients=K asks for)", "K", int
    )
    threat: str | None = flag(None, "who is looking: server (default) or aggregate", "NAME")
    defense: tuple[str, ...] = flag(
        (),
        "a defense with its parameters, repeatable, applied in order; e.g. clip:norm=0.5",
        "NAME:key=value",
    )
    steps: int | None = flag(None, "most iterations of a restart", "N", int)
    option: tuple[str, ...] = flag((), "another option of the attack, repeatable", "key=value")
    compile: bool = flag(False, "compile the search's step: faster on small networks, costs some seconds")
    precision: str | None = flag(
        None, "arithmetic of the network in a search: float32 or bf16 (default: float32)", "NAME"
    )
    local_epochs: int = flag(1, "local epochs E", "E")
    local_batch: int | None = flag(
        None, "local batch size B, or inf for all of a client's data (default: inf)", "B", count_or_infinity
    )
    lr: float = flag(1.0, "local learning rate η", "LR")
    frozen_norm: bool = flag(False, "clients train with BatchNorm in evaluation mode")
    sends_buffers: bool = flag(False, "clients send BatchNorm's buffers along, as in a whole state_dict")
    threshold_db: float = flag(30.0, "PSNR in dB above which an image counts as recovered", "DB")
    delta: float = flag(1e-5, "δ at which ε is reported", "DELTA")
    seed: int = flag(0, "seed of all random streams, >= 0", "N")
    device: str = flag("cpu", "where to compute: cpu, cuda, cuda:1, ...", "NAME")
    out: str | None = flag(
        None, "folder for report.json and reconstruction.png (default: runs/ATTACK-TIME)", "DIR"
    )
    resume: bool = flag(False, "go on from the search that a killed run with the same flags left in --out")
    json: bool = flag(False, "print the report as one JSON object on stdout and nothing else there")


def run_audit(attack: str, o: AuditOptions) -> int:
    """Run the audit, write its files, print its table. InputError where the flags are impossible."""
    from fltoolkit import audit, registry
    from fltoolkit.errors import require
    from fltoolkit.inversion.keep import forget, keeping
    from fltoolkit.report import terminal
    from fltoolkit.report.figures import reconstruction_figure
    from fltoolkit.report.files import output_folder, write_json
    from fltoolkit.specs import parse
    from fltoolkit.types import LocalSpec

    require(o.out is not None or not o.resume, "out", "the folder of the run to resume", o.out)
    spec = attack if not o.option else f"{attack}{',' if ':' in attack else ':'}{','.join(o.option)}"
    scene = audit.Scene(
        attack=registry.make_attack(
            spec, steps=o.steps, restarts=o.restarts, compile=o.compile or None, precision=o.precision
        ),
        data=o.data,
        model=o.model,
        batch=o.batch,
        victims=o.victims,
        clients=o.clients,
        threat=o.threat,
        defenses=o.defense,
        local=LocalSpec(o.local_epochs, o.local_batch, o.lr),
        frozen_norm=o.frozen_norm,
        sends_buffers=o.sends_buffers,
        seed=o.seed,
        device=o.device,
        delta=o.delta,
        threshold_db=o.threshold_db,
    )
    audit.Stage(scene)
    name = parse(attack)[0]
    folder = output_folder(o.out, name)
    bar = terminal.Bar(name)
    search = folder / "search"
    if not o.resume:
        forget(search)
    with keeping(search):
        result = audit.run(scene, bar)
    bar.close()
    write_json(folder / "report.json", result.report)
    threat = result.report["threat"]
    title = f"{name} on {o.data}, {o.model}, batch {o.batch}, {_defended(o.defense)}, {threat} view"
    reconstruction_figure(folder / "reconstruction.png", result.victims, title, result.input_range)
    forget(search)
    print(_summary(result.report, folder), file=sys.stderr if o.json else sys.stdout)
    if o.json:
        print(json.dumps(result.report, allow_nan=False))
    else:
        print("\n" + terminal.audit_table(result.victims))
    return 0


def _defended(defenses: tuple[str, ...]) -> str:
    return " + ".join(defenses) or "no defense"


def _summary(report: dict[str, Any], folder: Path) -> str:
    from fltoolkit.report.epsilon import epsilon_lines
    from fltoolkit.report.terminal import interval

    m = report["metrics"]
    defenses = _defended(tuple(d["name"] for d in report["defenses"]))
    rate = m["success_rate"]
    return "\n".join(
        [
            f"victims {report['victims']}, clients a round {report['clients']}, "
            f"defenses: {defenses}, threat: {report['threat']}",
            f"PSNR {m['psnr_db']['mean']:.2f} dB{interval(m['psnr_db']['ci95'])}, "
            f"gain over a trivial guess {m['psnr_gain_db']['mean']:+.2f} dB, "
            f"labels {m['label_accuracy']['mean']:.0%}",
            f"above {rate['threshold_db']:g} dB: {rate['value']:.0%} of victims{interval(rate['ci95'])}; "
            f"{report['seconds']:.1f} s",
            *epsilon_lines(report["epsilon"], "one round"),
            f"files: {folder / 'report.json'}, {folder / 'reconstruction.png'}",
        ]
    )
