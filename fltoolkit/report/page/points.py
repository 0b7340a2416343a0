"""What can be said of points beyond what they hold: short names, the loss of accuracy, the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fltoolkit.metrics.interval import mean_interval
from fltoolkit.report.page import numbers

Point = Mapping[str, Any]


def of_threat(run: Mapping[str, Any], threat: str) -> list[tuple[int, Point]]:
    """The points of a threat model with their places in the run, which are their ids on the page."""
    return [(i, p) for i, p in enumerate(run["points"]) if p["threat"] == threat]


def measured(points: Sequence[tuple[int, Point]]) -> list[tuple[int, Point]]:
    """Those that some attack could be run against."""
    return [(i, p) for i, p in points if p["leak_db"] is not None]


def undefended(run: Mapping[str, Any], threat: str) -> tuple[int, Point] | None:
    """The point without defense of a threat model."""
    return next(((i, p) for i, p in of_threat(run, threat) if not p["stack"]), None)


def without_defense(run: Mapping[str, Any]) -> Point | None:
    """Any point without defense: they share their training, so their accuracy too."""
    return next((p for p in run["points"] if not p["stack"]), None)


def short(run: Mapping[str, Any], point: Point) -> str:
    """A defense by the name of its curve and, where the curve has several strengths, by what differs."""
    stacks = {tuple(p["stack"]): None for p in run["points"] if p["defense"] == point["defense"]}
    if len(stacks) < 2:
        return str(point["defense"])
    split = {stack: [_pieces(spec) for spec in stack] for stack in stacks}
    mine = split.pop(tuple(point["stack"]))
    common = [[pieces[i] for pieces in split.values() if i < len(pieces)] for i in range(len(mine))]
    differ = [
        piece
        for own, others in zip(mine, common, strict=True)
        for piece in own
        if len(others) < len(split) or not all(piece in other for other in others)
    ]
    return f"{point['defense']}, {', '.join(differ)}" if differ else str(point["label"])


def _pieces(spec: str) -> list[str]:
    name, _, options = spec.partition(":")
    return [name, *options.split(",")] if options else [name]


def loss(point: Point, none: Point | None) -> tuple[float | None, list[float] | None]:
    """Accuracy lost against no defense, in points of percent, with its interval: of the differences seed by
    seed where both have the same number of seeds."""
    if none is None:
        return None, None
    mine, theirs = point["accuracy"].get("values"), none["accuracy"].get("values")
    if not point["stack"] or not mine or not theirs or len(mine) != len(theirs):
        return 100 * (none["accuracy"]["mean"] - point["accuracy"]["mean"]), None
    found = mean_interval([100 * (t - m) for m, t in zip(mine, theirs, strict=True)])
    return found["mean"], found["ci95"]


def floor_db(run: Mapping[str, Any], threat: str) -> float | None:
    """Mean PSNR of the best guess without any update, dB, on the victims without defense; None where no
    attack could be run."""
    found = undefended(run, threat)
    if found is None or found[1]["leak_db"] is None:
        return None
    return float(found[1]["trivial_db"]["mean"])


def epsilon_words(point: Point) -> str:
    e = point["epsilon"]
    if e["value"] is None:
        return "∞, no guarantee"
    return f"{numbers.epsilon(e['value'])} per {e['unit']} (δ = {e['delta']:g}, {e['view']} view)"


def details(point: Point) -> list[tuple[str, str]]:
    """What the tooltip of a point says, as names and values."""
    a, leak, best = point["accuracy"], point["leak_db"], point["strongest"]
    rate, pace = point["success_rate"], point["seconds"]
    accuracy = numbers.with_interval(f"{100 * a['mean']:.1f} %", numbers.interval(a["ci95"], 1, 100))
    leaked = numbers.with_interval(f"{leak['mean']:.1f} dB", numbers.interval(leak["ci95"], 1))
    success = numbers.with_interval(
        f"{100 * rate['value']:.0f} %", numbers.interval(rate.get("ci95"), 0, 100)
    )
    up, down = (numbers.size(point["bytes"][way]) for way in ("up", "down"))
    return [
        ("accuracy", accuracy),
        ("leak", f"{leaked}, n = {leak['n']}"),
        (f"above {rate['threshold_db']:g} dB", success),
        ("strongest attack", f"{best['attack']}, round {best['round']}"),
        ("ε", epsilon_words(point)),
        ("bytes a round", f"{up} up, {down} down"),
        ("seconds a round", numbers.seconds(pace["mean"])),
        ("Pareto front", "on it" if point["pareto"] else "not on it"),
    ]


def aloud(point: Point) -> str:
    """The same in one sentence, for those who listen."""
    return f"{point['label']}, {point['threat']}: " + "; ".join(f"{k} {v}" for k, v in details(point))
