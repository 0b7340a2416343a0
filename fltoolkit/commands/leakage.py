"""`leakage check`, `leakage update` and `leakage add`: leakage as a regression test."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fltoolkit.options import count_or_infinity, flag


@dataclass(frozen=True)
class CheckOptions:
    """The flags of `leakage check`."""

    baseline: str = flag("leakage.json", "the baseline", "FILE")
    only: str = flag("", "check only entries whose name contains this", "TEXT")
    seed: int = flag(1, "seed of the new measurement, another than the baseline's", "N")
    format: str = flag("text", "text, github (annotations on a pull request) or sarif", "NAME")


@dataclass(frozen=True)
class UpdateOptions:
    """The flags of `leakage update`."""

    baseline: str = flag("leakage.json", "the baseline", "FILE")
    only: str = flag("", "update only entries whose name contains this", "TEXT")
    reason: str = flag("", "why what leaks now is accepted; kept beside the numbers", "TEXT")


@dataclass(frozen=True)
class AddOptions:
    """The flags of `leakage add`: what is measured."""

    baseline: str = flag("leakage.json", "the baseline; made where it is not there", "FILE")
    attack: str = flag("idlg", "the attack", "NAME[:key=value]")
    data: str = flag("digits", "data set", "NAME")
    model: str = flag("mlp", "model: a known name, or module:function for your own", "NAME")
    batch: int = flag(1, "private examples of each client", "N")
    victims: int = flag(12, "independent victims", "N")
    clients: int | None = flag(None, "clients that the round mixes", "K", int)
    threat: str | None = flag(None, "who is looking: server (default) or aggregate", "NAME")
    defense: tuple[str, ...] = flag((), "a defense, repeatable, applied in order", "NAME:key=value")
    local_epochs: int = flag(1, "local epochs E", "E")
    local_batch: int | None = flag(None, "local batch size B, or inf", "B", count_or_infinity)
    lr: float = flag(1.0, "local learning rate η", "LR")
    max_psnr_db: float | None = flag(
        None, "a limit of the mean PSNR that holds whatever the baseline says", "DB", float
    )
    reason: str = flag("first measurement", "why what leaks now is accepted", "TEXT")


def run_check(o: CheckOptions) -> int:
    """Exit code 1 where something leaks more, or less, than the baseline says, or above its limit."""
    from fltoolkit.errors import require
    from fltoolkit.regression.baseline import Baseline
    from fltoolkit.regression.gate import check, failures
    from fltoolkit.regression.show import FORMATS, show
    from fltoolkit.report.terminal import Bar

    require(o.format in FORMATS, "format", f"one of {FORMATS}", o.format)
    bar = Bar("leakage")
    verdicts = check(Baseline.load(Path(o.baseline)), o.seed, o.only, bar)
    bar.close()
    print(show(verdicts, o.format, o.baseline))
    return 1 if failures(verdicts) else 0


def run_update(o: UpdateOptions) -> int:
    """Measure again and write what came out over what was there."""
    from fltoolkit.regression.baseline import Baseline
    from fltoolkit.regression.gate import update
    from fltoolkit.report.terminal import Bar

    path = Path(o.baseline)
    bar = Bar("leakage")
    update(Baseline.load(path), o.reason, o.only, tell=bar).save(path)
    bar.close()
    print(f"written: {path}", file=sys.stderr)
    return 0


def run_add(name: str, o: AddOptions) -> int:
    """Measure a new case and put it into the baseline."""
    from dataclasses import replace

    from fltoolkit.errors import InputError
    from fltoolkit.regression.baseline import Case
    from fltoolkit.regression.gate import load_or_empty, measured

    path = Path(o.baseline)
    baseline = load_or_empty(path)
    if name in baseline.entries:
        raise InputError(f"name must be new, got {name!r}: fltoolkit leakage update --only {name!r}")
    case = Case(
        o.attack,
        o.data,
        o.model,
        o.batch,
        o.victims,
        o.clients,
        o.threat,
        o.defense,
        o.local_epochs,
        o.local_batch,
        o.lr,
        o.max_psnr_db,
    )
    entry = measured(case, 0, o.reason)
    replace(baseline, entries={**baseline.entries, name: entry}).save(path)
    means = ", ".join(f"{k} {sum(v) / len(v):.4g}" for k, v in entry.measured.items())
    print(f"{name}: {means}; written: {path}", file=sys.stderr)
    return 0
