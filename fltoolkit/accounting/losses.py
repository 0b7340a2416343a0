"""Privacy loss distributions on a grid, composed: the accountant "pld".

Each step's loss is rounded upwards so that its δ(ε) is exact at every point of the grid (Doroshenko et al.
2022, arXiv:2207.04380, the discretisation of dp_accounting); sums of losses come from its convolutions.
Whatever is read from them is an upper bound on any grid; a finer one only brings it closer to the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from math import ceil, exp, floor, inf, isfinite, sqrt
from typing import Any

import numpy as np

from fltoolkit.accounting.gaussian import epsilon_of, smallest_epsilon, success_of
from fltoolkit.accounting.pairs import Pair, gaussian, merged

Spent = Mapping[Pair, int]
"""How often each pair was used."""
Key = frozenset[tuple[Pair, int]]
"""The same as something to remember results by."""

TOLERANCE = 1e-4
"""Aimed at: the part of a result by which the grid may push it up."""
FIRST_POINTS = 1000
"""Points of the first grid over the range of one step's loss."""
WIDEST = 10.0
"""The widest first grid, unless that has more than MOST_FIRST points."""
MOST_FIRST = 10_000
"""Points of the first grid over the range of one step's loss where hardly any noise makes that range vast."""
WIDEST_OF_ALL = 700.0
"""e to the power of a grid must be a float."""
NOISELESS, RARELY = 1e-4, 0.01
"""Below this σ and above this rate ε is beyond 10^7; sampling is left out of account, which only raises ε."""
MARGIN = 1.3
"""How much finer a grid is made than the error on the coarser ones asks for, which is only roughly known."""
MOST_POINTS = 4_000_000
"""Points of a composed distribution beyond which no grid is made finer."""
SMALLEST_DELTA = 1e-10
"""Below it the rounding of Fourier transforms would show in ε."""


def epsilon_exactly(spent: Spent, delta: float) -> float | None:
    """ε where no grid is needed: plain Gaussians only, or one single step. None elsewhere."""
    spent = _merged(spent)
    if not spent:
        return 0.0
    ((pair, count), *others) = spent.items()
    if others or count > 1:
        return None
    if pair.rate == 1:
        return epsilon_of(pair.mu, delta)
    return max(_of_one_step(pair, way, delta) for way in range(pair.ways))


def _of_one_step(pair: Pair, way: int, delta: float) -> float:
    def profile(e: float) -> float:
        return float(pair.deltas(way, np.array([e]))[0])

    return smallest_epsilon(profile, delta, pair.span(way, delta)[1])


def epsilon_by_losses(spent: Spent, delta: float, tolerance: float = TOLERANCE) -> float:
    """ε at `delta` >= 1e-10, from above, to `tolerance` of itself."""
    exact = epsilon_exactly(spent, delta)
    if exact is not None:
        return exact
    return _refined(frozenset(_merged(spent).items()), "epsilon", delta, tolerance)


def success_by_losses(spent: Spent, prior: float) -> float:
    """The smallest e^ε κ + δ(ε) over all ε, `prior` being κ in (0, 1); see `fltoolkit.accounting.bounds`."""
    spent = _merged(spent)
    if not spent:
        return prior
    ((pair, _), *others) = spent.items()
    if pair.rate == 1 and not others:
        return success_of(pair.mu, prior)
    return _refined(frozenset(spent.items()), "success", prior, TOLERANCE)


def _merged(spent: Spent) -> dict[Pair, int]:
    """All plain Gaussians as one, and with them what is as good as noiseless."""
    used = {p: n for p, n in spent.items() if n > 0}
    plain = {p: n for p, n in used.items() if p.rate == 1 or (p.noise < NOISELESS and p.rate > RARELY)}
    rest = {p: n for p, n in used.items() if p not in plain}
    mus = [p.unsampled_mu * sqrt(n) for p, n in plain.items()]
    return rest | ({gaussian(merged(mus)): 1} if mus else {})


@lru_cache(maxsize=4096)
def _refined(spent: Key, what: str, at: float, tolerance: float) -> float:
    """A value on grids that become finer until its error is below `tolerance` of it. The error falls with the
    square of the grid, so two grids tell how large it is and which grid will do."""
    tail = min(at, 1e-5) * 1e-5 / sum(n for _, n in spent)
    spans = [pair.span(way, tail) for pair, _ in spent for way in range(pair.ways)]
    widest = max(top - low for low, top in spans)
    grid = min(widest / FIRST_POINTS, max(WIDEST, widest / MOST_FIRST), WIDEST_OF_ALL)
    upper = dict.fromkeys(range(max(pair.ways for pair, _ in spent)), inf)
    coarser, ratio = inf, 0.0
    while True:
        size = _tighten(upper, partial(_composed, spent, grid, tail), lambda d: _READ[what](d, at))
        value = max(upper.values())
        error = (coarser - value) / (ratio**2 - 1) if isfinite(coarser) else inf
        if value == 0 or error <= tolerance * value:
            return value
        ratio = 4.0 if error == inf else min(max(MARGIN * sqrt(error / (tolerance * value)), 1.5), 16.0)
        if size * ratio > MOST_POINTS:
            return value
        coarser, grid = value, grid / ratio


def _tighten(upper: dict[int, float], compose: Callable[[int], Any], read: Callable[[Any], float]) -> int:
    """Lower the `upper` bounds of those ways that may be the largest; returns the most points of any."""
    value, size = 0.0, 0
    for way in sorted(upper, key=lambda w: -upper[w]):
        if upper[way] > value:
            losses = compose(way)
            size = max(size, losses.size)
            upper[way] = min(upper[way], read(losses))
        value = max(value, upper[way])
    return size


def _composed(spent: Key, grid: float, tail: float, way: int) -> Any:
    from dp_accounting.pld import pld_pmf

    whole = None
    for pair, count in sorted(spent, key=lambda item: (item[0].kind, item[0].noise, item[0].rate)):
        part = _step(pair, min(way, pair.ways - 1), grid, tail).to_dense_pmf()
        part = part.self_compose(count, min(tail, 1e-15)) if count > 1 else part
        whole = part if whole is None else pld_pmf.compose_pmfs(whole, part, min(tail, 1e-15))
    return whole


def _step(pair: Pair, way: int, grid: float, tail: float) -> Any:
    from dp_accounting.pld import pld_pmf

    low, top = pair.span(way, tail)
    first, last = floor(low / grid), ceil(top / grid)
    deltas = pair.deltas(way, np.arange(first, last + 1) * grid)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid, first, last, deltas)


def _epsilon(losses: Any, delta: float) -> float:
    with np.errstate(over="ignore"):  # a ratio of masses beyond floats counts as infinite, which is right
        return float(losses.get_epsilon_for_delta(delta))


def _success(losses: Any, prior: float) -> float:
    """The smallest e^ε κ + δ(ε), which falls and then rises again, as it is convex in e^ε."""
    from scipy.optimize import minimize_scalar

    def bound(e: float) -> float:
        return float(exp(min(e, 700.0)) * prior + losses.get_delta_for_epsilon(e))

    found = minimize_scalar(bound, bracket=(0.0, 1.0), tol=1e-9)
    return min(float(found.fun), 1.0)


_READ: Mapping[str, Callable[[Any, float], float]] = {"epsilon": _epsilon, "success": _success}
