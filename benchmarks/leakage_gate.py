"""How often the leakage gate alarms: on unchanged code, and where something was broken.

    python benchmarks/leakage_gate.py --repeats 200 --broken 40 --out benchmarks/results/leakage_gate.json

A baseline of cheap cases is measured once. A clean repeat checks all of it under another seed; it should
alarm in at most alpha = 1 % of the repeats. Then each regression is put in and checked under other seeds;
it should be caught at least 95 % of the time. Rates carry exact 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fltoolkit.metrics.interval import rate_interval
from fltoolkit.regression.baseline import ALPHA, Baseline, Case
from fltoolkit.regression.gate import check, failures, measured
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import Bar, table
from fltoolkit.secagg import bonawitz_client, bonawitz_server

HERE = Path(__file__).parent / "results" / "leakage_gate.json"
ATTACK = "idlg:restarts=1,steps=40,adapt=true"
COHORT = 4
NOISE = "gaussian:placement=client,noise_multiplier={:.4f}"

CASES = {
    "clipped": Case(ATTACK, defenses=("clip:norm=0.5",)),
    "noisy sum": Case(
        ATTACK, clients=COHORT, defenses=("clip:norm=0.5", NOISE.format(0.1), f"secagg:clients={COHORT}")
    ),
    "sum": Case(ATTACK, clients=COHORT, defenses=(f"secagg:clients={COHORT}",)),
}

BROKEN = {
    "clip norm times 2": ("clipped", ("clip:norm=1",)),
    "noise over the root of the cohort": (
        "noisy sum",
        ("clip:norm=0.5", NOISE.format(0.1 / COHORT**0.5), f"secagg:clients={COHORT}"),
    ),
    "defense off": ("clipped", ()),
    "mask reused": ("sum", None),
}


def baseline() -> Baseline:
    return Baseline({name: measured(case, 0, "benchmark") for name, case in CASES.items()})


@contextmanager
def masks_reused() -> Iterator[None]:
    """Every mask is the keystream of one seed."""
    real = bonawitz_client.add_mask

    def add_mask(words: np.ndarray, seed: bytes, subtract: bool = False) -> None:
        real(words, bytes(16), subtract)

    bonawitz_client.add_mask = bonawitz_server.add_mask = add_mask  # type: ignore[attr-defined]
    try:
        yield
    finally:
        bonawitz_client.add_mask = bonawitz_server.add_mask = real  # type: ignore[attr-defined]


def clean(known: Baseline, seed: int) -> bool:
    """Whether a check of everything alarms."""
    return bool(failures(check(known, seed)))


def broken(known: Baseline, name: str, seed: int) -> bool:
    """Whether the check of the entry that a regression breaks alarms, at the level of a check of
    everything."""
    entry, defenses = BROKEN[name]
    if defenses is None:
        with masks_reused():
            return bool(failures(check(known, seed, entry)))
    changed = replace(known.entries[entry], case=replace(known.entries[entry].case, defenses=defenses))
    return bool(failures(check(replace(known, entries={**known.entries, entry: changed}), seed, entry)))


def show(result: dict[str, Any]) -> str:
    rows = [("nothing", *_row(result["clean"]), f"<= {ALPHA:.0%}")]
    rows += [(name, *_row(found), ">= 95%") for name, found in result["broken"].items()]
    return table(("what was broken", "checks", "alarms", "95 % interval", "aim"), rows)


def _row(alarms: list[bool]) -> tuple[str, str, str]:
    found = rate_interval(sum(alarms), len(alarms))
    low, high = found["ci95"]
    return str(len(alarms)), f"{found['value']:.1%}", f"[{low:.1%}, {high:.1%}]"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help="clean repeats (default: 200)")
    parser.add_argument("--broken", type=int, default=40, help="checks of each regression (default: 40)")
    parser.add_argument("--show", action="store_true", help="run nothing: print what there is")
    parser.add_argument("--out", default=str(HERE), metavar="FILE")
    o = parser.parse_args(argv)
    path = Path(o.out)
    nothing: dict[str, Any] = {"clean": [], "broken": {}}
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else nothing
    if not o.show:
        known = baseline()
        bar = Bar("gate", ends=True)
        total = o.repeats + o.broken * len(BROKEN)
        for name in BROKEN:
            alarms = result["broken"].setdefault(name, [])
            while len(alarms) < o.broken:
                alarms.append(broken(known, name, 10_000 + len(alarms)))
                _keep(path, result)
                bar(sum(map(len, result["broken"].values())), total, name)
        while len(result["clean"]) < o.repeats:
            result["clean"].append(clean(known, 1 + len(result["clean"])))
            _keep(path, result)
            bar(o.broken * len(BROKEN) + len(result["clean"]), total, "clean")
        bar.close()
    print(show(result))
    return 0


def _keep(path: Path, result: dict[str, Any]) -> None:
    result |= {"command": document.command_line(), "versions": document.versions()}
    write_json(path, result)


if __name__ == "__main__":
    sys.exit(main())
