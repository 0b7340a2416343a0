"""What the points of a threat model say, in a few sentences with numbers; nothing that is not in the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fltoolkit.report.page import numbers, points
from fltoolkit.report.page.points import Point

QUIET_DB = 20.0
"""A leak below is called low here."""
NO_LOSS = 0.05
"""Percentage points that show as 0.0."""


@dataclass(frozen=True)
class Says:
    """about one threat model. figures: (value, interval, name) without defense; sentences: as HTML."""

    threat: str
    figures: tuple[tuple[str, str, str], ...]
    sentences: tuple[Markup, ...]


def says(run: Mapping[str, Any], threat: str) -> Says:
    none = points.undefended(run, threat)
    sentences = [*_recovered(none), *_quiet(run, threat), _guaranteed(run, threat)]
    return Says(threat, _figures(none), tuple(_joined(s) for s in sentences))


def _joined(sentence: Markup) -> Markup:
    """With its units on the lines of their numbers."""
    return sentence.replace(" dB", "\u00a0dB").replace(" %", "\u00a0%")


def _figures(none: tuple[int, Point] | None) -> tuple[tuple[str, str, str], ...]:
    if none is None:
        return ()
    a, leak = none[1]["accuracy"], none[1]["leak_db"]
    found = [
        (f"{100 * a['mean']:.1f} %", numbers.interval(a["ci95"], 1, 100), "test accuracy without a defense")
    ]
    if leak is not None:
        found.append(
            (f"{leak['mean']:.1f} dB", numbers.interval(leak["ci95"], 1), "leaked without a defense")
        )
    return tuple(found)


def _recovered(none: tuple[int, Point] | None) -> list[Markup]:
    if none is None or none[1]["strongest"] is None:
        return []
    p, rate = none[1], none[1]["success_rate"]
    return [
        Markup(
            "Without a defense, <code>{}</code> was the strongest of the attacks tried: in round {} it "
            "brought {:.0f} % of {} back above {:g} dB."
        ).format(
            p["strongest"]["attack"],
            p["strongest"]["round"],
            100 * rate["value"],
            numbers.plural(p["leak_db"]["n"], "victim"),
            rate["threshold_db"],
        )
    ]


def _quiet(run: Mapping[str, Any], threat: str) -> list[Markup]:
    """The points of the front below 20 dB, and which of them loses least accuracy."""
    front = [(i, p) for i, p in points.measured(points.of_threat(run, threat)) if p["pareto"]]
    quiet = [(i, p) for i, p in front if p["leak_db"]["mean"] < QUIET_DB]
    if not front:
        return [Markup("No attack could be run here.")]
    if not quiet:
        i, p = min(front, key=lambda ip: ip[1]["leak_db"]["mean"])
        words = Markup("No defense tried keeps the mean leak below {:g} dB; the least is {:.1f} dB, by {}.")
        return [words.format(QUIET_DB, p["leak_db"]["mean"], _link(run, i, p))]
    none = points.undefended(run, threat)
    if none is not None and none[1]["leak_db"] is not None and none[1]["leak_db"]["mean"] < QUIET_DB:
        words = Markup("The mean leak is below {:g} dB without any defense: {:.1f} dB{}.")
        return [words.format(QUIET_DB, none[1]["leak_db"]["mean"], _guess(run, threat))]
    i, p = max(quiet, key=lambda ip: ip[1]["accuracy"]["mean"])
    lead = Markup("Below {:g} dB with the least loss of accuracy, of the defenses tried: {}, with {:.1f} dB")
    text = lead.format(QUIET_DB, _link(run, i, p), p["leak_db"]["mean"]) + _cost(run, p)
    rest = [(j, q) for j, q in quiet if j != i]
    if rest:
        text += Markup(" Also on the front below {:g} dB: {}.").format(QUIET_DB, _links(run, rest))
    return [text]


def _guess(run: Mapping[str, Any], threat: str) -> str:
    floor = points.floor_db(run, threat)
    return "" if floor is None else f", where the best guess without an update has {floor:.1f} dB"


def _cost(run: Mapping[str, Any], p: Point) -> Markup:
    lost, ci = points.loss(p, points.without_defense(run))
    if lost is None:
        return Markup(".")
    if max(abs(v) for v in (lost, *(ci or ()))) < NO_LOSS:
        return Markup(" at no loss of accuracy.")
    tail = "; the interval includes zero" if ci is not None and ci[0] <= 0 <= ci[1] else ""
    words = Markup(" at a loss of {} percentage points{}{}.")
    shown = numbers.interval(ci, 1)
    return words.format(numbers.number(lost, 1), f" {shown}" if shown else "", tail)


def _guaranteed(run: Mapping[str, Any], threat: str) -> Markup:
    """Which points have a finite ε."""
    here = points.of_threat(run, threat)
    finite = [(i, p) for i, p in here if p["epsilon"]["value"] is not None]
    if not finite:
        return Markup("No point has a finite ε in this view: whatever attacks found, nothing is guaranteed.")
    i, p = min(finite, key=lambda ip: ip[1]["epsilon"]["value"])
    words = Markup(
        "{} of {} points have a finite ε in this view; the smallest is {} per {}, by {} at {:.1f} % accuracy."
    )
    text = words.format(
        len(finite),
        len(here),
        numbers.epsilon(p["epsilon"]["value"]),
        p["epsilon"]["unit"],
        _link(run, i, p),
        100 * p["accuracy"]["mean"],
    )
    rest = [(j, q) for j, q in finite if j != i]
    return text + Markup(" The others: {}.").format(_links(run, rest, True)) if rest else text


def _links(run: Mapping[str, Any], found: list[tuple[int, Point]], with_epsilon: bool = False) -> Markup:
    shown = [
        _link(run, i, p) + (f" ({numbers.epsilon(p['epsilon']['value'])})" if with_epsilon else "")
        for i, p in found
    ]
    return Markup(", ").join(shown)


def _link(run: Mapping[str, Any], place: int, point: Point) -> Markup:
    return Markup('<a href="#row-{}">{}</a>').format(place, points.short(run, point))
