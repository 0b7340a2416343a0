"""From privacy events to ε, per view.

Each ε comes from the privacy-loss-distribution accountant of dp_accounting (Doroshenko et al. 2022,
arXiv:2207.04380). What no event protects has ε = ∞. Cohorts have a fixed size, so no amplification by
sampling is claimed: every client is counted as taking part in every round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from math import inf

from fltoolkit.errors import require
from fltoolkit.types import PrivacyEvent

RELATIVE_GRID = 3e-5
"""Width of the privacy loss grid as a part of ε."""

Rounds = Sequence[tuple[PrivacyEvent, ...]]
"""The events of each round."""


def epsilon(rounds: Rounds, views: frozenset[str], delta: float) -> float:
    """The ε at `delta` that the events protecting any of `views` give over all rounds, ∞ where a round
    has none.

    Events of one round about the same release are alternative guarantees; the one with the smaller ε is
    taken. Different releases and different rounds compose.
    """
    require(0 < delta < 1, "delta", "between 0 and 1", delta)
    if not rounds:
        return 0.0
    counts: dict[PrivacyEvent, int] = defaultdict(int)
    for events in rounds:
        releases: dict[str, list[PrivacyEvent]] = defaultdict(list)
        for e in events:
            if e.view in views:
                releases[e.release].append(e)
        if not releases:
            return inf
        for alternatives in releases.values():
            counts[_best(tuple(alternatives), delta)] += 1
    return _compose(counts, delta)


def epsilon_by_view(rounds: Rounds, messages_hidden: bool, delta: float) -> dict[str, float]:
    """ε for whoever sees messages (their sum, where a secure sum hides them) and whoever sees the
    released aggregate."""
    message = frozenset({"sum"} if messages_hidden else {"message"})
    return {
        "message": epsilon(rounds, message, delta),
        "aggregate": epsilon(rounds, frozenset({"sum", "aggregate"}), delta),
    }


@cache
def _best(alternatives: tuple[PrivacyEvent, ...], delta: float) -> PrivacyEvent:
    """The guarantee with the smallest ε. Cached: rounds repeat the same events."""
    if len(alternatives) == 1:
        return alternatives[0]
    return min(alternatives, key=lambda e: _compose({e: 1}, delta))


def _compose(counts: dict[PrivacyEvent, int], delta: float) -> float:
    """From the PLD accountant. Its grid is a fixed part of a first estimate, so that ε = 0.02 and ε = 2,000
    come out to the same relative precision at the same cost."""
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    rough = RdpAccountant()
    for e, count in counts.items():
        rough.compose(e.event, count)
    grid = min(max(float(rough.get_epsilon(delta)) * RELATIVE_GRID, 1e-7), 1e3)
    accountant = PLDAccountant(value_discretization_interval=grid)
    for e, count in counts.items():
        accountant.compose(e.event, count)
    return float(accountant.get_epsilon(delta))
