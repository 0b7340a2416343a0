"""The accountants by name: each gives an ε at δ for what was spent.

- "pld": exact where there is a closed form, else privacy loss distributions; see `losses`.
- "rdp": Rényi differential privacy as dp_accounting has it (Mironov 2017, arXiv:1702.07476; with Poisson
  sampling Mironov, Talwar and Zhang 2019, arXiv:1908.10530; with samples of fixed size theorem 27 of Wang,
  Balle and Kasiviswanathan 2018, arXiv:1808.00087). Above the truth by 8 to 80 % in ordinary settings.
- "prv": the upper end of what Opacus computes from privacy random variables (Gopi, Lee and Wutschitz 2021,
  arXiv:2106.02848), about 0.01 above the truth. It knows Poisson samples with one record more or less, no
  others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache

import numpy as np

from fltoolkit.accounting.curves import Curve, epsilon_of_curves
from fltoolkit.accounting.losses import SMALLEST_DELTA, Key, Spent, epsilon_by_losses, epsilon_exactly
from fltoolkit.accounting.pairs import ONE_WAY, TWO_SIDED
from fltoolkit.errors import InputError
from fltoolkit.rdp_event import INTEGER_ORDERS


def epsilon_by_pld(spent: Spent, delta: float) -> float:
    """From above, to 1e-4 of itself. Below δ = 1e-10, where Fourier transforms round too coarsely, what has
    no closed form is counted by "rdp"."""
    if any(isinstance(step, Curve) for step in spent):
        return epsilon_by_rdp(spent, delta)
    if delta >= SMALLEST_DELTA:
        return epsilon_by_losses(spent, delta)
    exact = epsilon_exactly(spent, delta)
    return epsilon_by_rdp(spent, delta) if exact is None else exact


def epsilon_by_rdp(spent: Spent, delta: float) -> float:
    """A replaced record of a Poisson sample is counted as that of a sample of fixed size, whose theorem
    covers it, if loosely. InputError where `spent` mixes that with records added or removed."""
    return _rdp(frozenset(spent.items()), delta)


def epsilon_by_prv(spent: Spent, delta: float) -> float:
    """InputError where a record is replaced and sampled, and where the method fails numerically."""
    return _prv(frozenset(spent.items()), delta)


@lru_cache(maxsize=1024)
def _rdp(spent: Key, delta: float) -> float:
    from dp_accounting import (
        GaussianDpEvent,
        NeighboringRelation,
        PoissonSampledDpEvent,
        SampledWithoutReplacementDpEvent,
    )
    from dp_accounting.rdp import RdpAccountant

    replaced = {pair.kind != ONE_WAY for pair, _ in spent if not isinstance(pair, Curve) and pair.rate < 1}
    if len(replaced) > 1:
        raise InputError("accountant must be 'pld' where fixed and Poisson samples are mixed, got 'rdp'")
    relation = NeighboringRelation.REPLACE_ONE if True in replaced else NeighboringRelation.ADD_OR_REMOVE_ONE
    curves = [(step, count) for step, count in spent if isinstance(step, Curve)]
    orders = INTEGER_ORDERS if curves else None
    accountant = RdpAccountant(orders, neighboring_relation=relation)
    for pair, count in spent:
        if isinstance(pair, Curve):
            continue
        noise = pair.noise / 2 if pair.kind == TWO_SIDED else pair.noise
        event = GaussianDpEvent(noise)
        if pair.rate < 1 and pair.kind == ONE_WAY:
            event = PoissonSampledDpEvent(pair.rate, event)
        elif pair.rate < 1:
            drawn = Fraction(pair.rate).limit_denominator(10**12)
            event = SampledWithoutReplacementDpEvent(drawn.denominator, drawn.numerator, event)
        accountant.compose(event, count)
    if curves:
        total = accountant._rdp + sum(count * np.array(curve.values) for curve, count in curves)
        return epsilon_of_curves(total, delta)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=1024)
def _prv(spent: Key, delta: float) -> float:
    import warnings

    import numpy as np

    if any(isinstance(pair, Curve) for pair, _ in spent):
        raise InputError("accountant must be 'pld' or 'rdp' for integer mechanisms, got 'prv'")
    if any(pair.kind != ONE_WAY for pair, _ in spent):
        raise InputError(
            "accountant must be 'pld' or 'rdp' where records are replaced, got 'prv', "
            "which knows only Poisson samples whose neighbours have one record more or less"
        )
    if not spent:
        return 0.0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(pair.noise, pair.rate, count) for pair, count in spent]
        try:
            return float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError, IndexError, MemoryError) as e:
            reason = str(e) or type(e).__name__
            raise InputError(f"accountant must be 'pld' or 'rdp' here: 'prv' fails ({reason})") from e


ACCOUNTANTS: Mapping[str, Callable[[Spent, float], float]] = {
    "pld": epsilon_by_pld,
    "rdp": epsilon_by_rdp,
    "prv": epsilon_by_prv,
}
