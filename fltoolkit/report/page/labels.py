"""Where the names of curves go, so that they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SIZE = 13.0
WIDTH = 0.58
"""A letter's mean width as a share of its size, on the wide side."""
REACH = 9.0
FAR = (1.0, 1.8, 2.8, 5.0, 8.0, 12.0)
"""How far a name may be from its point, in units of REACH."""


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area in common."""
        x = min(self.right, other.right) - max(self.left, other.left)
        y = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, x) * max(0.0, y)

    def outside(self, frame: Box) -> float:
        """Area beyond `frame`."""
        return (self.right - self.left) * (self.bottom - self.top) - self.overlap(frame)


@dataclass(frozen=True)
class Label:
    """x, y: the middle of the text, whose middle line is at y. leader: from the text to its point, where the
    two are far apart."""

    text: str
    x: float
    y: float
    leader: tuple[float, float, float, float] | None = None


def around(x: float, y: float, r: float) -> Box:
    return Box(x - r, y - r, x + r, y + r)


def along(a: tuple[float, float], b: tuple[float, float], r: float = 1.0) -> list[Box]:
    """Small boxes on the line from a to b."""
    count = max(1, int(max(abs(a[0] - b[0]), abs(a[1] - b[1])) / 5))
    steps = [i / count for i in range(count + 1)]
    return [around(a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), r) for t in steps]


def place(
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    hard: Iterable[Box],
    soft: Iterable[Box],
    frame: Box,
) -> list[Label]:
    """A label for each curve, beside the point of it where there is most room. hard: boxes that labels must
    not cover; soft: that they should not."""
    taken, lines, found = list(hard), list(soft), []
    names: list[Box] = []
    for text, points in curves:
        wide, high = WIDTH * SIZE * len(text), SIZE
        best: tuple[float, Label, Box] | None = None
        for rank, (label, box) in enumerate(_candidates(text, points, wide, high)):
            cost = 0.01 * rank + 50 * box.outside(frame)
            cost += sum(4 * box.overlap(b) for b in taken) + sum(box.overlap(b) for b in lines)
            cost += sum(9 * step.overlap(b) for step in _leader(label) for b in names)
            if best is None or cost < best[0]:
                best = (cost, label, box)
        if best is not None:
            found.append(best[1])
            taken.append(best[2])
            names.append(best[2])
            lines += _leader(best[1])
    return found


def _leader(label: Label) -> list[Box]:
    """The line from a name to its point, in small boxes."""
    return [] if label.leader is None else along(label.leader[:2], label.leader[2:])


def _candidates(
    text: str, points: Sequence[tuple[float, float]], wide: float, high: float
) -> Iterable[tuple[Label, Box]]:
    for x, y in points:
        for far in FAR:
            for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
                room = REACH * far * (0.75 if across and down else 1.0)
                cx = x + across * (room + wide / 2)
                cy = y + down * (room + high / 2)
                box = Box(cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2)
                end = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
                yield Label(text, cx, cy, (*end, x, y) if far > 1 else None), box
