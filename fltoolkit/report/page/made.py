"""Where the page comes from: the question in words and as a file, what was refused, how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fltoolkit.report.page import numbers, points


def question(run: Mapping[str, Any]) -> tuple[str, str]:
    """The question as a sentence in two halves: what is asked, and of which federation."""
    grid = run["grid"]
    f = grid["federation"]
    ask = (
        f"What does each defense cost in accuracy, and what still leaks, when FedAvg trains {f['model']} on "
        f"{f['data']}"
    )
    clients = "K by the data" if f.get("clients") is None else f"K = {f['clients']:,}"
    batch = "∞" if f.get("batch") is None else f["batch"]
    setting = (
        f"with {clients} clients, C = {f['fraction']:g}, E = {f['epochs']}, B = {batch}, over "
        f"{numbers.plural(f['rounds'], 'round')}, {numbers.plural(len(grid['seeds']), 'seed')} and "
        f"{numbers.plural(grid['victims'], 'victim')} in each attacked round?"
    )
    return ask, setting


def setting(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The question's values with their names, short."""
    grid = run["grid"]
    f = grid["federation"]
    values = [
        ("data", f["data"]),
        ("partition", f["partition"]),
        ("model", f["model"]),
        ("clients K", "by the data" if f.get("clients") is None else f"{f['clients']:,}"),
        ("share a round C", f"{f['fraction']:g}"),
        ("local epochs E", f"{f['epochs']}"),
        ("batch B", "∞ (all)" if f.get("batch") is None else f"{f['batch']}"),
        ("rate η", f"{f['lr']:g}" if "lr" in f else numbers.NOTHING),
        ("rounds", f"{f['rounds']:,}"),
        ("attacked", ", ".join(map(str, grid["attack_rounds"]))),
        ("seeds", ", ".join(map(str, grid["seeds"]))),
        ("δ", f"{grid['delta']:g}"),
    ]
    return [(k, str(v)) for k, v in values]


def refused(run: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(attack, reason, places) of attacks that could not be run, each pair once."""
    found: dict[tuple[str, str], list[points.Point]] = {}
    for p in run["points"]:
        for tried in p["attacks"]:
            if tried["refused"]:
                found.setdefault((tried["attack"], tried["refused"]), []).append(p)
    return [(attack, reason, _places(run, of)) for (attack, reason), of in found.items()]


def _places(run: Mapping[str, Any], refused: list[points.Point]) -> list[str]:
    """Where, a threat model as a whole where it is all of it."""
    said = []
    for threat in dict.fromkeys(p["threat"] for p in refused):
        here = [points.short(run, p) for p in refused if p["threat"] == threat]
        every = len(here) == len(points.of_threat(run, threat))
        said.append(f"{threat}: " + ("every defense" if every else "; ".join(here)))
    return said


def as_toml(run: Mapping[str, Any]) -> str:
    """The question as a file that `python -m fltoolkit tradeoff` reads."""
    grid = run["grid"]
    federation = {k: v for k, v in grid["federation"].items() if v is not None}
    if "batch" in grid["federation"] and "batch" not in federation:
        federation["batch"] = "inf"
    leakage = {k: grid[k] for k in ("attacks", "threats", "victims", "threshold_db")}
    lines = _lines({k: grid[k] for k in ("seeds", "delta")})
    lines += ["", "[federation]", *_lines(federation)]
    lines += ["", "[leakage]", *_lines(leakage | {"rounds": grid["attack_rounds"]})]
    for defense in grid["defenses"]:
        lines += ["", "[[defense]]", *_lines(defense)]
    return "\n".join(lines)


def _lines(values: Mapping[str, Any]) -> list[str]:
    """JSON's texts, numbers, truth values and lists are TOML's too."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
