"""The table: a row a point, each cell as text, interval and the value to sort by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fltoolkit.report.page import numbers, points
from fltoolkit.report.page.numbers import ci_of, mean_of
from fltoolkit.report.page.points import Point


@dataclass(frozen=True)
class Column:
    key: str
    head: str
    unit: str = ""
    kind: str = "number"


@dataclass(frozen=True)
class Cell:
    """sort: the value in run.json, empty where there is none."""

    text: str
    sort: str
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    id: int
    short: str
    label: str
    threat: str
    pareto: bool
    plotted: bool
    cells: tuple[Cell, ...]


COLUMNS = (
    Column("threat", "Threat", kind="text"),
    Column("accuracy", "Accuracy", "%"),
    Column("loss", "Loss", "points"),
    Column("leak", "Leak", "dB"),
    Column("gain", "Gain", "dB"),
    Column("ssim", "SSIM"),
    Column("labels", "Labels", "%"),
    Column("success", "Success", "%"),
    Column("epsilon", "ε"),
    Column("bytes", "Bytes", "up a round"),
    Column("seconds", "Seconds", "a round"),
    Column("strongest", "Strongest attack", kind="text"),
)
"""All but the first, which names the defense."""


def rows(run: Mapping[str, Any]) -> list[Row]:
    none = points.without_defense(run)
    return [
        Row(
            id=i,
            short=points.short(run, p),
            label=p["label"],
            threat=p["threat"],
            pareto=p["pareto"],
            plotted=p["leak_db"] is not None,
            cells=_cells(p, none),
        )
        for i, p in enumerate(run["points"])
    ]


def _cells(p: Point, none: Point | None) -> tuple[Cell, ...]:
    lost, lost_ci = points.loss(p, none)
    cells = (
        Cell(p["threat"], p["threat"]),
        _measure(p, "accuracy", 1, 100),
        Cell(numbers.number(lost, 1), _sort(lost), numbers.interval(lost_ci, 1)),
        _measure(p, "leak_db", 1),
        _measure(p, "gain_db", 1),
        _measure(p, "ssim", 2),
        _measure(p, "label_accuracy", 0, 100),
        _measure(p, "success_rate", 0, 100, "value"),
        _epsilon(p),
        _bytes(p),
        _seconds(p),
        _strongest(p),
    )
    return cells


def _measure(p: Point, name: str, digits: int, scale: float = 1, key: str = "mean") -> Cell:
    value = mean_of(p, name, key)
    text = numbers.number(None if value is None else scale * value, digits)
    return Cell(text, _sort(value), numbers.interval(ci_of(p, name), digits, scale))


def _epsilon(p: Point) -> Cell:
    e = p["epsilon"]
    note = "" if e["value"] is None else f"per {e['unit']}"
    return Cell(
        numbers.epsilon(e["value"]), "Infinity" if e["value"] is None else _sort(e["value"]), "", note
    )


def _bytes(p: Point) -> Cell:
    up, down = p["bytes"]["up"], p["bytes"]["down"]
    return Cell(numbers.size(up), _sort(up), "", f"down {numbers.size(down)}")


def _seconds(p: Point) -> Cell:
    s = p["seconds"]
    shown = "" if s["ci95"] is None else f"[{', '.join(f'{max(0.0, v):.2g}' for v in s['ci95'])}]"
    return Cell(numbers.seconds(s["mean"]), _sort(s["mean"]), shown)


def _strongest(p: Point) -> Cell:
    best = p["strongest"]
    if best is None:
        return Cell(numbers.NOTHING, "", "", "none could be run")
    name, _, options = best["attack"].partition(":")
    where = f"round {best['round']}, n = {p['leak_db']['n']}"
    return Cell(name, best["attack"], "", f"{options}; {where}" if options else where)


def _sort(value: float | None) -> str:
    return "" if value is None else repr(float(value))
