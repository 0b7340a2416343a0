"""Mechanisms known by a bound on their Rényi divergence only, and what they cost beside Gaussian ones.

Mironov 2017, arXiv:1702.07476: curves at equal orders add up (proposition 1). The orders are integers, since
some bounds hold at those alone (Agarwal, Kairouz and Liu 2021, arXiv:2110.04995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fltoolkit.rdp_event import INTEGER_ORDERS, RdpCurve


@dataclass(frozen=True)
class Curve:
    """One step that is (α, ε)-RDP for each α of `INTEGER_ORDERS` and the ε of `values` beside it."""

    values: tuple[float, ...]
    rate: float = 1.0


def zcdp(rho: float, xi: float = 0.0) -> Curve:
    """(ξ, ρ)-zCDP: ε(α) = ξ + ρ α (Bun and Steinke 2016, arXiv:1605.02065)."""
    return Curve(tuple(xi + rho * a for a in INTEGER_ORDERS))


def curve_of(event: RdpCurve) -> Curve:
    known = dict(zip(event.orders, event.values, strict=True))
    return Curve(tuple(known.get(a, np.inf) for a in INTEGER_ORDERS))


def epsilon_of_curves(values: np.ndarray, delta: float) -> float:
    """ε at `delta` of the sum of curves `[orders]`."""
    from dp_accounting.rdp import compute_epsilon

    finite = np.isfinite(values)
    orders = np.array(INTEGER_ORDERS)[finite]
    return float(compute_epsilon(orders, values[finite], delta)[0]) if len(orders) else float("inf")
