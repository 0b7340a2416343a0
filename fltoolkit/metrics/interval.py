"""Estimates with their 95 % confidence intervals. The unit is the victim: victims are independent."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from scipy import stats

from fltoolkit.errors import require

LEVEL = 0.95


def mean_interval(values: Sequence[float], level: float = LEVEL) -> dict[str, Any]:
    """`{"mean", "ci95": [low, high] or None, "values"}` by Student's t; None for fewer than two values.
    level: of the interval, another one where several must hold together."""
    require(len(values) > 0, "values", "at least one number", values)
    v = np.asarray(values, float)
    low_high = None
    if len(v) > 1:
        half = float(stats.t.ppf((1 + level) / 2, len(v) - 1) * v.std(ddof=1) / sqrt(len(v)))
        low_high = [float(v.mean()) - half, float(v.mean()) + half]
    return {"mean": float(v.mean()), "ci95": low_high, "values": v.tolist()}


def rate_interval(successes: int, trials: int) -> dict[str, Any]:
    """`{"value", "ci95"}` of a success probability: the exact interval of Clopper and Pearson 1934."""
    require(0 <= successes <= trials and trials > 0, "successes", f"between 0 and {trials}", successes)
    ci = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="exact")
    return {"value": successes / trials, "ci95": [float(ci.low), float(ci.high)]}
