"""Axes with round ticks, and ε as a colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
"""Evenly spaced; lightness grows, so that the order survives grey print and colour blindness."""
LEAST_EPSILON = 1e-3
STEPS = (0.5, 1, 2, 5, 10, 20, 25)


@dataclass(frozen=True)
class Axis:
    """Values low..high over the pixels start..end; values beyond are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    step: float

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + i * self.step for i in range(count + 1)]


def axis(
    values: Sequence[float], start: float, end: float, limits: tuple[float, float], ticks: int = 7
) -> Axis:
    """An axis over all `values`, within `limits`, that begins and ends at a tick; at most `ticks` steps."""
    low = max(min(values, default=limits[0]), limits[0])
    high = min(max(values, default=limits[1]), limits[1])
    for step in STEPS:
        first, last = floor(low / step) * step, ceil(high / step) * step
        if (last - first) / step <= ticks:
            break
    if last == first:
        first, last = first - step, last + step
    return Axis(first, last, start, end, step)


MOST_DECADES = 6
"""More names of powers of ten do not fit beside each other."""


@dataclass(frozen=True)
class EpsilonScale:
    """Colours for ε from low to high, evenly in its logarithm."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None]) -> EpsilonScale | None:
        """From the whole power of ten below the least to the one above the largest; None without any."""
        finite = [max(v, LEAST_EPSILON) for v in values if v is not None]
        if not finite:
            return None
        first, last = floor(log10(min(finite))), ceil(log10(max(finite)))
        return cls(10.0**first, 10.0 ** max(last, first + 1))

    def place(self, value: float) -> float:
        """0 at low, 1 at high."""
        span = log10(self.high) - log10(self.low)
        return min(max((log10(max(value, LEAST_EPSILON)) - log10(self.low)) / span, 0.0), 1.0)

    def colour(self, value: float) -> str:
        at = self.place(value) * (len(VIRIDIS) - 1)
        i = min(int(at), len(VIRIDIS) - 2)
        ends = (_rgb(VIRIDIS[i]), _rgb(VIRIDIS[i + 1]))
        mixed = [round(a + (at - i) * (b - a)) for a, b in zip(*ends, strict=True)]
        return "#" + "".join(f"{c:02x}" for c in mixed)

    @property
    def decades(self) -> list[float]:
        """Whole powers of ten from low to high, at most `MOST_DECADES` of them."""
        first, last = round(log10(self.low)), round(log10(self.high))
        return [10.0**k for k in range(first, last + 1, 1 + (last - first) // MOST_DECADES)]


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
