"""Verdicts for people, for pull requests, and for code scanning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fltoolkit import __version__
from fltoolkit.errors import InputError
from fltoolkit.regression.decide import LESS, LIMIT, MISSING, MORE, Verdict
from fltoolkit.regression.measure import METRICS
from fltoolkit.report.terminal import table

FORMATS = ("text", "github", "sarif")

RULES = {
    MORE: "The adversary sees more than the baseline allows.",
    LESS: "The adversary sees less than in the baseline: a weaker attack would hide leaks.",
    LIMIT: "The attack recovers more than the limit allows.",
    MISSING: "Nothing was measured before: run `fltoolkit leakage update`.",
}


def show(verdicts: Sequence[Verdict], kind: str, baseline: str) -> str:
    """The verdicts as text, as annotations of GitHub Actions, or as SARIF 2.1.0 that points at the
    baseline."""
    if kind not in FORMATS:
        raise InputError(f"format must be one of {FORMATS}, got {kind!r}")
    return {"text": text, "github": github, "sarif": sarif}[kind](verdicts, baseline)


def text(verdicts: Sequence[Verdict], baseline: str) -> str:
    """A table of what changed, or of everything where nothing did, and one line that sums up."""
    bad = [v for v in verdicts if not v.passes]
    header = ("entry", "metric", "baseline", "now", "95 % interval", "p", "verdict")
    rows = [
        (v.entry, v.metric, _number(v.old), _number(v.new), _range(v), f"{v.p:.1g}", v.verdict)
        for v in bad or verdicts
    ]
    entries = len({v.entry for v in verdicts})
    words = f"{len(bad)} of {len(verdicts)} metrics of {entries} entries do not pass"
    return (
        f"{table(header, rows)}\n{words if bad else f'all {len(verdicts)} metrics of {entries} entries pass'}"
    )


def github(verdicts: Sequence[Verdict], baseline: str) -> str:
    """One `::error` line a metric that does not pass; they show on the pull request."""
    lines = [
        f"::error file={baseline},title=leakage: {v.entry}::{sentence(v)}" for v in verdicts if not v.passes
    ]
    return "\n".join(lines) or f"::notice file={baseline},title=leakage::all {len(verdicts)} metrics pass"


def sarif(verdicts: Sequence[Verdict], baseline: str) -> str:
    found: dict[str, Any] = {
        "version": "2.1.0",
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "fltoolkit leakage",
                        "version": __version__,
                        "rules": [
                            {"id": _id(k), "shortDescription": {"text": v}} for k, v in sorted(RULES.items())
                        ],
                    }
                },
                "results": [
                    {
                        "ruleId": _id(v.verdict),
                        "level": "error",
                        "message": {"text": f"{v.entry}: {sentence(v)}"},
                        "locations": [{"physicalLocation": {"artifactLocation": {"uri": baseline}}}],
                    }
                    for v in verdicts
                    if not v.passes
                ],
            }
        ],
    }
    return json.dumps(found, indent=2)


def sentence(v: Verdict) -> str:
    """What happened to a metric."""
    unit = f" {METRICS[v.metric].unit}".rstrip()
    before = "nothing" if v.old is None else f"{_number(v.old)}{unit}"
    return f"{v.metric} {v.verdict}: {before} -> {_number(v.new)}{unit} {_range(v)}, p = {v.p:.1g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _range(v: Verdict) -> str:
    return "" if v.interval is None else f"[{v.interval[0]:.4g}, {v.interval[1]:.4g}]"


def _id(verdict: str) -> str:
    return "leakage/" + verdict.replace(" ", "-")
