"""A mechanism's privacy as a curve: Rényi differential privacy at some orders.

Mironov 2017, arXiv:1702.07476. For mechanisms whose guarantee is a bound on the Rényi divergence and no
event of dp_accounting. Curves at equal orders compose by addition (Proposition 1 there).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from fltoolkit.errors import require

INTEGER_ORDERS = tuple(float(a) for a in (*range(2, 64), 80, 96, 128, 192, 256, 384, 512, 768, 1024))
"""For bounds that hold at integer orders alone."""


@dataclass(frozen=True)
class RdpCurve:
    """The mechanism is (α, ε)-RDP for each α of `orders`, all > 1, and the ε of `values` beside it."""

    orders: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        require(len(self.orders) == len(self.values) > 0, "values", "one for each order", len(self.values))
        require(all(a > 1 for a in self.orders), "orders", "above 1", self.orders)
        good = all(isfinite(v) and v >= 0 for v in self.values)
        require(good, "values", "finite numbers >= 0", self.values)

    @classmethod
    def of(cls, bound: Callable[[float], float], orders: tuple[float, ...] = INTEGER_ORDERS) -> RdpCurve:
        """The curve of ε = bound(α)."""
        return cls(orders, tuple(bound(a) for a in orders))
