"""ε in reports and in words: by view and, in separate ledgers, by what it hides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fltoolkit.report.document import finite
from fltoolkit.training.budget import UNITS, Budget


def epsilons(budget: Budget) -> dict[str, Any]:
    """The report's `epsilon`: of clients, and under "example" of single examples where a defense protects
    them. null stands for infinity."""
    spent = budget.spent()
    nothing = {"message": float("inf"), "aggregate": float("inf")}
    entries = {
        unit: {k: finite(v) for k, v in spent.get(unit, nothing).items()}
        | {"delta": budget.delta, "unit": unit, "adjacency": adjacency(budget, unit)}
        for unit in UNITS
        if unit == "client" or unit in spent
    }
    return entries["client"] | {k: v for k, v in entries.items() if k != "client"}


def adjacency(budget: Budget, unit: str) -> str:
    """How neighbouring data sets differ: by one contribution set to zero, or by one added or removed."""
    kinds = {e.adjacency for events in budget.rounds for e in events if e.unit == unit}
    return "add-remove" if "add-remove" in kinds else "zero-out"


def by_round(budget: Budget) -> dict[str, dict[str, float | None]]:
    """ε so far, for a line of metrics."""
    return {unit: {k: finite(v) for k, v in views.items()} for unit, views in budget.spent().items()}


def epsilon_lines(report: Mapping[str, Any], over: str) -> list[str]:
    """The report's `epsilon` for people."""
    lines = []
    for e in (report, report.get("example")):
        if e is not None:
            lines.append(
                f"ε of messages {_shown(e['message'])}, of the aggregates {_shown(e['aggregate'])} "
                f"at δ = {e['delta']:g} ({over}, per {e['unit']}, {e['adjacency']})"
            )
    return lines


def _shown(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3f}"
