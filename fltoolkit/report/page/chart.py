"""The chart: accuracy over leakage, an SVG panel a threat model, all with the same axes.

Points are links to their rows of the table, so that they can be reached and followed without script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from fltoolkit.report.page import labels, numbers, points
from fltoolkit.report.page.labels import Box
from fltoolkit.report.page.scales import Axis, EpsilonScale, axis
from fltoolkit.report.page.shapes import shape

WIDTH, HEIGHT = 460, 400
LEFT, RIGHT, TOP, BOTTOM = 50, 446, 30, 346
Indexed = Sequence[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Frame:
    """What all panels share."""

    x: Axis
    y: Axis
    epsilon: EpsilonScale | None
    places: Mapping[str, int]
    threshold: float

    def at(self, point: Mapping[str, Any]) -> tuple[float, float]:
        return self.x(point["leak_db"]["mean"]), self.y(100 * point["accuracy"]["mean"])


@dataclass(frozen=True)
class Panel:
    threat: str
    svg: Markup
    shown: int
    missing: tuple[str, ...]
    """Labels of points that no attack could be run against."""


def frame(run: Mapping[str, Any]) -> Frame:
    """Axes over every point and interval of the run."""
    seen = [p for p in run["points"] if p["leak_db"] is not None]
    threshold = run["grid"]["threshold_db"]
    leaks = [v for p in seen for v in (p["leak_db"]["mean"], *(p["leak_db"]["ci95"] or ()))]
    shares = [100 * v for p in seen for v in (p["accuracy"]["mean"], *(p["accuracy"]["ci95"] or ()))]
    names = dict.fromkeys(p["defense"] for p in run["points"])
    return Frame(
        x=axis([*leaks, threshold], LEFT, RIGHT, (0.0, max(40.0, threshold))),
        y=axis(shares, BOTTOM, TOP, (0.0, 100.0)),
        epsilon=EpsilonScale.over(p["epsilon"]["value"] for p in run["points"]),
        places={name: i for i, name in enumerate(names)},
        threshold=threshold,
    )


def panels(run: Mapping[str, Any]) -> list[Panel]:
    """One panel a threat model, in the order of the run."""
    shared = frame(run)
    return [_panel(run, t["name"], i, shared) for i, t in enumerate(run["threats"])]


def _panel(run: Mapping[str, Any], threat: str, number: int, f: Frame) -> Panel:
    all_points = points.of_threat(run, threat)
    shown = points.measured(all_points)
    curves = [[(i, p) for i, p in shown if p["defense"] == name] for name in f.places]
    floor = points.floor_db(run, threat)
    parts = [
        _grid(f),
        _references(f, floor),
        *[_line([f.at(p) for _, p in c], "curve") for c in curves if len(c) > 1],
        _line(_stairs(shown, f), "front"),
        *[_bars(p, f) for _, p in shown],
        *[_name(label) for label in _names(curves, shown, f, floor)],
        *[_point(i, p, f) for i, p in sorted(shown, key=lambda ip: ip[1]["leak_db"]["mean"])],
    ]
    svg = Markup(
        '<svg class="panel" viewBox="0 0 {} {}" role="group" aria-labelledby="panel-{} panel-{}-title" '
        'aria-describedby="panel-{}-desc"><title id="panel-{}-title">Accuracy over leakage, {}</title>'
        '<desc id="panel-{}-desc">{}</desc>{}</svg>'
    ).format(
        WIDTH, HEIGHT, *[number] * 4, threat, number, _description(shown, threat, f), Markup("").join(parts)
    )
    missing = tuple(p["label"] for _, p in all_points if p["leak_db"] is None)
    return Panel(threat, svg, len(shown), missing)


def _description(shown: Indexed, threat: str, f: Frame) -> str:
    front = ", ".join(p["label"] for _, p in shown if p["pareto"]) or "none"
    return (
        f"{len(shown)} points under the threat model {threat}. Across: leak to the strongest attack tried, "
        f"{f.x.low:g} to {f.x.high:g} dB, less is better. Up: test accuracy, {f.y.low:g} to {f.y.high:g} %, "
        f"more is better. On the Pareto front: {front}."
    )


def _grid(f: Frame) -> Markup:
    rules = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, RIGHT, f.y(t), f.y(t)
        )
        for t in f.y.ticks
    ]
    ups = [
        Markup('<text class="tick" x="{}" y="{:.1f}" dy=".34em" text-anchor="end">{:g}</text>').format(
            LEFT - 8, f.y(t), t
        )
        for t in f.y.ticks
    ]
    across = [
        Markup(
            '<line class="notch" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
            '<text class="tick" x="{0:.1f}" y="{3}" text-anchor="middle">{4:g}</text>'
        ).format(f.x(t), BOTTOM, BOTTOM + 5, BOTTOM + 20, t)
        for t in f.x.ticks
    ]
    names = Markup(
        '<text class="axis" x="{0}" y="{1}">← less</text>'
        '<text class="axis" x="{2}" y="{1}" text-anchor="middle">leak to the strongest attack tried, dB'
        '</text><g transform="translate(13 {3}) rotate(-90)">'
        '<text class="axis" x="{4}" text-anchor="end">more →</text>'
        '<text class="axis" text-anchor="middle">test accuracy, %</text></g>'
    ).format(LEFT, HEIGHT - 10, (LEFT + RIGHT) / 2 + 18, (TOP + BOTTOM) / 2, (BOTTOM - TOP) / 2)
    return Markup('<g class="axes" aria-hidden="true">{}{}</g>').format(
        Markup("").join(rules + ups + across), names
    )


def _references(f: Frame, floor: float | None) -> Markup:
    """Lines at the threshold and at what is guessed without any update."""
    marks = [(f.threshold, f"recovered: {f.threshold:g} dB", "threshold")]
    if floor is not None and f.x.low <= floor <= f.x.high:
        marks.append((floor, "guess without update", "floor"))
    near = len(marks) > 1 and abs(f.x(marks[0][0]) - f.x(marks[1][0])) < 140
    texts = [
        Markup(
            '<line class="reference {4}" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
            '<text class="reference-name" x="{5:.1f}" y="{6}" text-anchor="{7}">{3}</text>'
        ).format(f.x(v), TOP, BOTTOM, text, kind, *_spot(f.x(v), near and kind == "floor"))
        for v, text, kind in marks
    ]
    return Markup('<g aria-hidden="true">{}</g>').format(Markup("").join(texts))


def _spot(x: float, raised: bool) -> tuple[float, float, str]:
    y = TOP - 20 if raised else TOP - 7
    if x < LEFT + 70:
        return x, y, "start"
    return (x, y, "end") if x > RIGHT - 60 else (x, y, "middle")


def _stairs(shown: Indexed, f: Frame) -> list[tuple[float, float]]:
    """Corners of the front: what is left of or above it, no point reaches."""
    front = sorted(f.at(p) for _, p in shown if p["pareto"])
    corners: list[tuple[float, float]] = []
    for x, y in front:
        if corners:
            corners.append((x, corners[-1][1]))
        corners.append((x, y))
    return corners


def _line(corners: Sequence[tuple[float, float]], kind: str) -> Markup:
    if len(corners) < 2:
        return Markup("")
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return Markup('<path class="{}" d="{}" aria-hidden="true"/>').format(kind, path)


def _extent(point: Mapping[str, Any], f: Frame) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The ends of the intervals, across and up, in pixels."""
    x, y = f.at(point)
    found = []
    if (ci := point["leak_db"]["ci95"]) is not None:
        found.append(((f.x(ci[0]), y), (f.x(ci[1]), y)))
    if (ci := point["accuracy"]["ci95"]) is not None:
        found.append(((x, f.y(100 * ci[0])), (x, f.y(100 * ci[1]))))
    return found


def _bars(point: Mapping[str, Any], f: Frame) -> Markup:
    path = "".join(f"M{a[0]:.1f},{a[1]:.1f}L{b[0]:.1f},{b[1]:.1f}" for a, b in _extent(point, f))
    return Markup('<path class="bars" d="{}" aria-hidden="true"/>').format(path) if path else Markup("")


def _names(curves: Sequence[Indexed], shown: Indexed, f: Frame, floor: float | None) -> list[labels.Label]:
    spots = [
        (c[0][1]["defense"], [f.at(p) for _, p in sorted(c, key=lambda ip: -ip[1]["strength"])])
        for c in curves
        if c
    ]
    hard = [labels.around(*f.at(p), 8) for _, p in shown]
    soft = [b for _, p in shown for ends in _extent(p, f) for b in labels.along(*ends)]
    for _, line in spots:
        soft += [b for a, z in pairwise(line) for b in labels.along(a, z, 1.5)]
    for value in (f.threshold, *([] if floor is None else [floor])):
        soft += labels.along((f.x(value), TOP), (f.x(value), BOTTOM))
    stairs = _stairs(shown, f)
    soft += [b for a, z in pairwise(stairs) for b in labels.along(a, z, 2)]
    return labels.place(spots, hard, soft, Box(LEFT + 2, TOP + 2, RIGHT + 10, BOTTOM - 2))


def _name(label: labels.Label) -> Markup:
    line = Markup("")
    if label.leader is not None:
        line = Markup('<line class="leader" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
            *label.leader
        )
    return line + Markup(
        '<text class="name" x="{:.1f}" y="{:.1f}" dy=".34em" text-anchor="middle" '
        'aria-hidden="true">{}</text>'
    ).format(label.x, label.y, label.text)


def _point(number: int, point: Mapping[str, Any], f: Frame) -> Markup:
    e, kind = point["epsilon"], "point"
    fill = Markup("")
    if e["value"] is None or f.epsilon is None:
        kind += " without-epsilon"
    else:
        kind += " per-example" if e["unit"] == "example" else ""
        fill = Markup(' style="fill:{}"').format(f.epsilon.colour(e["value"]))
    x, y = f.at(point)
    return Markup(
        '<a id="point-{0}" class="{1}" href="#row-{0}" data-point="{0}" aria-label="{2}" '
        'transform="translate({3:.1f} {4:.1f})"><circle class="target" r="13"/><circle class="ring" r="12"/>'
        '<path class="marker" d="{5}"{6}/></a>'
    ).format(number, kind, points.aloud(point), x, y, shape(f.places[point["defense"]]), fill)


def shape_legend(run: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Each defense with its marker."""
    icon = Markup('<svg class="icon" viewBox="-10 -10 20 20" aria-hidden="true"><path d="{}"/></svg>')
    names = dict.fromkeys(p["defense"] for p in run["points"])
    return [(name, icon.format(shape(i))) for i, name in enumerate(names)]


def epsilon_legend(run: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """Ticks of the colour scale with their places, from the least ε; None where no point has an ε."""
    scale = frame(run).epsilon
    if scale is None:
        return None
    return [(numbers.power_of_ten(v), f"{100 * scale.place(v):.1f}") for v in scale.decades]
