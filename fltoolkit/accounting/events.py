"""What one privacy event costs, as dominating pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf, sqrt
from typing import Any

from fltoolkit.accounting.curves import curve_of, zcdp
from fltoolkit.accounting.losses import Spent
from fltoolkit.accounting.pairs import EITHER_WAY, ONE_WAY, TWO_SIDED, Pair
from fltoolkit.errors import InputError, require, unknown
from fltoolkit.types import PrivacyEvent

ZERO_OUT, ADD_REMOVE, REPLACE_ONE = "zero-out", "add-remove", "replace-one"
ADJACENCIES = (ZERO_OUT, ADD_REMOVE, REPLACE_ONE)

Steps = Counter[Any]
"""How often each `Pair` or `Curve` was used."""
Walk = Callable[[Any, str, int], "Steps | None"]


def costs(event: PrivacyEvent) -> tuple[Spent, ...]:
    """The alternative guarantees of `event`, each as how often it uses which pairs; empty where it gives
    none.

    With a sample of fixed size and zero-out adjacency there are two: the record counted as drawn for certain,
    and the amplified guarantee for replacing it, which covers a record that becomes null. With add-remove
    adjacency there is none to state, since data sets from which m of N are drawn are equally large. Raises
    InputError there, and on events other than Gaussian ones, sampled or not, and their compositions.
    """
    require(event.adjacency in ADJACENCIES, "adjacency", f"one of {ADJACENCIES}", event.adjacency)
    require(event.count >= 0, "count", ">= 0", event.count)
    ways = [event.adjacency]
    if event.adjacency == ZERO_OUT and _has_fixed(event.event):
        ways.append(REPLACE_ONE)
    found = (_walk(event.event, way, event.count) for way in ways)
    return tuple(steps for steps in found if steps is not None)


def step(sigma: float, rate: float, sampling: str, adjacency: str) -> Pair:
    """One step of the Gaussian mechanism with noise σ > 0 over the clip norm and sampling rate in (0, 1].

    sampling: "poisson" or "fixed", which are the same at rate 1. With "fixed", `adjacency` is "zero-out"
    for the guarantee without amplification, or "replace-one".
    """
    replaced = adjacency == REPLACE_ONE
    if rate == 1 or (sampling == "fixed" and not replaced):
        return Pair(ONE_WAY, sigma / 2 if replaced else sigma)
    if sampling == "fixed":
        return Pair(EITHER_WAY, sigma / 2, rate)
    return Pair(TWO_SIDED if replaced else ONE_WAY, sigma, rate)


def _walk(event: Any, adjacency: str, count: int) -> Steps | None:
    name = type(event).__name__
    if name not in _WALKS:
        unknown("privacy event", name, _WALKS)
    return _WALKS[name](event, adjacency, count)


def _gaussian(event: Any, adjacency: str, count: int) -> Steps | None:
    return _sampled(event, 1.0, "poisson", adjacency, count)


def _poisson(event: Any, adjacency: str, count: int) -> Steps | None:
    return _sampled(event.event, event.sampling_probability, "poisson", adjacency, count)


def _fixed(event: Any, adjacency: str, count: int) -> Steps | None:
    if adjacency == ADD_REMOVE:
        raise InputError(
            "adjacency must be 'replace-one' or 'zero-out' where a sample has a fixed size, because "
            f"neighbouring data sets are equally large there, got {adjacency!r} for {event}"
        )
    rate = event.sample_size / event.source_dataset_size
    return _sampled(event.event, rate, "fixed", adjacency, count)


def _sampled(event: Any, rate: float, sampling: str, adjacency: str, count: int) -> Steps | None:
    precision = _precision(event)
    if precision == inf and rate > 0 and count > 0:
        return None
    if precision == 0 or rate == 0 or count == 0:
        return Counter()
    return Counter({step(1 / sqrt(precision), rate, sampling, adjacency): count})


def _precision(event: Any) -> float:
    """Σ 1 / σ² of the Gaussian releases in `event`, which are made on the same sample and so are like one."""
    name = type(event).__name__
    if name == "GaussianDpEvent":
        return float(event.noise_multiplier**-2) if event.noise_multiplier > 0 else inf
    if name == "SelfComposedDpEvent":
        return float(event.count * _precision(event.event))
    if name == "ComposedDpEvent":
        return sum(_precision(e) for e in event.events)
    raise InputError(f"what is done to a sample must be made of GaussianDpEvents, got {event}")


def _self_composed(event: Any, adjacency: str, count: int) -> Steps | None:
    return _walk(event.event, adjacency, count * event.count)


def _composed(event: Any, adjacency: str, count: int) -> Steps | None:
    total: Steps = Counter()
    for part in event.events:
        steps = _walk(part, adjacency, count)
        if steps is None:
            return None
        total.update(steps)
    return total


def _has_fixed(event: Any) -> bool:
    if type(event).__name__ == "SampledWithoutReplacementDpEvent":
        return bool(event.sample_size < event.source_dataset_size)
    inner = [*getattr(event, "events", ()), *filter(None, [getattr(event, "event", None)])]
    return any(_has_fixed(e) for e in inner)


def _curve(event: Any, adjacency: str, count: int) -> Steps | None:
    """Stated for a contribution put to zero, or one more or less where the noise stays; for a replaced one
    these mechanisms state nothing."""
    if adjacency == REPLACE_ONE:
        return None
    name = type(event).__name__
    curve = curve_of(event) if name == "RdpCurve" else zcdp(event.rho, event.xi)
    return Counter({curve: count} if count else {})


_WALKS: dict[str, Walk] = {
    "ZCDpEvent": _curve,
    "RdpCurve": _curve,
    "NoOpDpEvent": lambda event, adjacency, count: Counter(),
    "NonPrivateDpEvent": lambda event, adjacency, count: None,
    "GaussianDpEvent": _gaussian,
    "PoissonSampledDpEvent": _poisson,
    "SampledWithoutReplacementDpEvent": _fixed,
    "SelfComposedDpEvent": _self_composed,
    "ComposedDpEvent": _composed,
}
