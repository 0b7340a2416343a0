"""Checking a baseline and rewriting it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fltoolkit.errors import InputError, require, unknown
from fltoolkit.regression.baseline import Baseline, Case, Entry
from fltoolkit.regression.decide import Verdict, judge, level_of
from fltoolkit.regression.measure import measure
from fltoolkit.report import document

Tell = Callable[[int, int, str], None]


def check(baseline: Baseline, seed: int, only: str = "", tell: Tell = lambda *_: None) -> list[Verdict]:
    """Measure the entries whose name contains `only` again, under another seed, and judge them."""
    chosen = _chosen(baseline, only)
    level = level_of(baseline.alpha, baseline.entries)
    verdicts: list[Verdict] = []
    for i, (name, entry) in enumerate(chosen.items()):
        tell(i, len(chosen), name)
        require(seed != entry.seed, "seed", f"another than the baseline's of {name!r}", seed)
        verdicts += judge(name, entry, measure(entry.case, seed), level, entry.case.max_psnr_db)
    return verdicts


def update(
    baseline: Baseline, reason: str, only: str = "", seed: int = 0, tell: Tell = lambda *_: None
) -> Baseline:
    """The baseline with what is measured now, and why it is accepted."""
    require(bool(reason.strip()), "reason", "why the change is accepted", reason)
    chosen, entries = _chosen(baseline, only), dict(baseline.entries)
    for i, (name, entry) in enumerate(chosen.items()):
        tell(i, len(chosen), name)
        entries[name] = measured(entry.case, seed, reason)
    return replace(baseline, entries=entries)


def measured(case: Case, seed: int, reason: str, **objects: object) -> Entry:
    """A new entry. Four digits are kept, which no test here can tell from more."""
    values = {k: [float(f"{x:.4g}") for x in v] for k, v in measure(case, seed, **objects).items()}
    return Entry(case, values, seed, reason, document.versions())


def load_or_empty(path: Path) -> Baseline:
    return Baseline.load(path) if path.exists() else Baseline({})


def _chosen(baseline: Baseline, only: str) -> Mapping[str, Entry]:
    found = {n: e for n, e in baseline.entries.items() if only in n}
    if only and not found:
        unknown("entry", only, baseline.entries)
    if not found:
        raise InputError("baseline must hold at least one entry: fltoolkit leakage add NAME")
    return found


def failures(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [v for v in verdicts if not v.passes]
