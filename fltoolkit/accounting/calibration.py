"""ε of a noise multiplier, and the noise multiplier for an ε, where every step is the same.

σ is always the standard deviation of the noise divided by the clip norm C of one contribution. Replacing one
contribution moves a sum by up to 2 C; that factor is in the pairs, not in σ.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil, exp, floor, isfinite, log, log10

from fltoolkit.accounting.events import ADD_REMOVE
from fltoolkit.accounting.setting import Setting, check_noise
from fltoolkit.errors import InputError, require

PRECISION = 1e-4
"""How far above the smallest σ that of an ε may be, relative to it."""
SIGMAS = (1e-3, 1e6)
"""Where σ is looked for."""


def gaussian_epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    *,
    accountant: str = "pld",
    adjacency: str = ADD_REMOVE,
    sampling: str = "poisson",
    population: int | None = None,
) -> float:
    """The ε at `delta` in (0, 1) of `steps` >= 1 Gaussian releases with noise multiplier σ > 0, never below
    it.

    sampling: "poisson", each record by itself with probability `sampling_rate` q in (0, 1]; "fixed", m = q
    N of the N = `population` records without replacement; "full", all of them, with q = 1. adjacency:
    "zero-out", "add-remove" or "replace-one"; "zero-out" with "fixed" is the smaller of what a record that
    is drawn for certain has, and what a replaced one has. accountant: see
    `fltoolkit.accounting.accountants`.

    Raises InputError for values outside these ranges, for an N q that is no whole number, and for "fixed"
    with "add-remove", which fits no data sets of the same size.
    """
    setting = Setting(sampling_rate, steps, delta, accountant, adjacency, sampling, population)
    check_noise(noise_multiplier)
    setting.check_adjacency("ε", lambda s: s.epsilon(noise_multiplier))
    return setting.epsilon(noise_multiplier)


def gaussian_sigma(
    epsilon: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    *,
    accountant: str = "pld",
    adjacency: str = ADD_REMOVE,
    sampling: str = "poisson",
    population: int | None = None,
) -> float:
    """The smallest noise multiplier σ whose `gaussian_epsilon` is <= `epsilon` > 0, to 1e-4 of itself and
    rounded up. Raises InputError as that does, and where no σ between 1e-3 and 1e6 will do."""
    setting = Setting(sampling_rate, steps, delta, accountant, adjacency, sampling, population)
    require(isfinite(epsilon) and epsilon > 0, "epsilon", "a finite number > 0", epsilon)
    setting.check_adjacency("σ", lambda s: _smallest_sigma(s, epsilon))
    return _smallest_sigma(setting, epsilon)


@lru_cache(maxsize=256)
def _smallest_sigma(setting: Setting, epsilon: float) -> float:
    """Regula falsi in ln σ and ln ε, between which the relation is nearly linear."""
    low, high = _bracket(setting, epsilon)
    while high[0] / low[0] > 1 + PRECISION:
        guess = _between(low, high, epsilon)
        far = high[0] / guess > guess / low[0]
        sigma = guess * (1 + 0.4 * PRECISION if far else 1 - 0.4 * PRECISION)
        point = sigma, setting.epsilon(sigma)
        low, high = (low, point) if point[1] <= epsilon else (point, high)
    digit = 10.0 ** (floor(log10(high[0])) - 5)
    number = ceil(high[0] / digit * (1 - 1e-12))
    while setting.epsilon(number * digit) > epsilon:
        number += 1
    return float(f"{number * digit:.6g}")


Point = tuple[float, float]
"""σ and its ε."""


def _bracket(setting: Setting, epsilon: float) -> tuple[Point, Point]:
    """One σ with an ε above `epsilon` and one with an ε at most that."""
    sigma = 1.0
    if setting.accountant != "pld":
        sigma = _smallest_sigma(replace(setting, accountant="pld"), epsilon)
    low: Point | None = None
    high: Point | None = None
    while low is None or high is None:
        if not SIGMAS[0] <= sigma <= SIGMAS[1]:
            expected = f"what some σ from {SIGMAS[0]} to {SIGMAS[1]} has with {setting.accountant!r}"
            raise InputError(f"epsilon must be {expected}, got {epsilon}")
        found = setting.epsilon(sigma)
        if found > epsilon:
            low, sigma = (sigma, found), sigma * min(max(1.05 * found / epsilon, 1.2), 8.0)
        else:
            high, sigma = (sigma, found), sigma * max(min(0.95 * found / epsilon, 0.8), 0.125)
    return low, high


def _between(low: Point, high: Point, epsilon: float) -> float:
    """Where the line between the two points, on logarithmic axes, has ε; half way where it has no slope."""
    left, right = log(low[0]), log(high[0])
    part = 0.5
    if isfinite(low[1]) and high[1] > 0:
        part = log(low[1] / epsilon) / log(low[1] / high[1])
    return exp(left + min(max(part, 0.01), 0.99) * (right - left))
