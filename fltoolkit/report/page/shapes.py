"""Markers, one shape a defense, as SVG path data around the origin."""

from __future__ import annotations

from math import cos, pi, sin, sqrt

RADIUS = 6.0


def _polygon(corners: int, turn: float = -90.0, stretch: float = 1.0) -> str:
    """A regular polygon of the circle's area, first corner at `turn` degrees."""
    r = RADIUS * stretch * sqrt(2 * pi / (corners * sin(2 * pi / corners)))
    angles = [turn * pi / 180 + 2 * pi * i / corners for i in range(corners)]
    return _closed([(r * cos(a), r * sin(a)) for a in angles])


def _star(corners: int, inner: float, turn: float = -90.0) -> str:
    radii = [RADIUS * 1.45, RADIUS * 1.45 * inner] * corners
    angles = [turn * pi / 180 + pi * i / corners for i in range(2 * corners)]
    return _closed([(r * cos(a), r * sin(a)) for r, a in zip(radii, angles, strict=True)])


def _cross(turn: float) -> str:
    wide, thin = RADIUS * 1.2, RADIUS * 0.42
    quarter = [(-thin, -wide), (thin, -wide), (thin, -thin)]
    corners = []
    for step in range(4):
        a = pi * step / 2 + turn * pi / 180
        corners += [(x * cos(a) - y * sin(a), x * sin(a) + y * cos(a)) for x, y in quarter]
    return _closed(corners)


def _closed(corners: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f},{y:.2f}" for x, y in corners) + "Z"


CIRCLE = f"M{-RADIUS},0a{RADIUS},{RADIUS} 0 1,0 {2 * RADIUS},0a{RADIUS},{RADIUS} 0 1,0 {-2 * RADIUS},0Z"

SHAPES = (
    CIRCLE,
    _polygon(4, 45),
    _polygon(3),
    _polygon(4, 0),
    _polygon(3, 90),
    _cross(0),
    _star(5, 0.45),
    _polygon(6),
    _cross(45),
    _polygon(5),
    _polygon(3, 0),
    _polygon(3, 180),
    _star(4, 0.4),
    _star(6, 0.6),
)


def shape(place: int) -> str:
    """The marker of the defense at this place in the grid; shapes come again after the last."""
    return SHAPES[place % len(SHAPES)]
