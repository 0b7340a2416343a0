"""From the privacy events of rounds to ε, per view and unit.

What hides a whole client and what hides one example of a client are two ledgers that are never added up.
Every ε is the accountant "pld"'s. What no event protects has ε = ∞.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import inf
from typing import Any

from fltoolkit.accounting.accountants import epsilon_by_pld
from fltoolkit.accounting.curves import Curve
from fltoolkit.accounting.events import ADD_REMOVE, REPLACE_ONE, ZERO_OUT, costs
from fltoolkit.accounting.losses import SMALLEST_DELTA, Key, Spent, epsilon_by_losses
from fltoolkit.accounting.pairs import Pair
from fltoolkit.errors import InputError, require
from fltoolkit.types import UPDATE, PrivacyEvent

UNITS = ("client", "example")

ROUGHLY = 0.1
"""How precise a first bound is, where many owners spend differently."""

Rounds = Sequence[tuple[PrivacyEvent, ...]]
"""The events of each round."""

Release = tuple[Key, ...]
"""The alternative guarantees for one release of one round; empty where there is none."""

Ledger = Counter[Release]
"""How often each release was made."""


def epsilon(rounds: Rounds, views: frozenset[str], delta: float, unit: str = "client") -> float:
    """The ε at `delta` that the events of `unit` protecting any of `views` give over all rounds.

    Events of one round about the same release are alternative guarantees; those are taken that give the
    smallest ε over all rounds. Different releases and different rounds compose.

    unit "client": ∞ where a round has no event that protects the update. unit "example": events compose for
    each owner by itself, since owners' examples are disjoint, and the largest ε of any owner counts. An
    owner without an event in a round took no part in it and spends nothing, so a defense has to give one
    for each client that does; ∞ where an owner's events of a round leave all `views` open, or no round has
    any.

    Raises InputError as `shared_adjacency` does, and where `delta` or `unit` is none.
    """
    require(0 < delta < 1, "delta", "between 0 and 1", delta)
    require(unit in UNITS, "unit", f"one of {UNITS}", unit)
    if not rounds:
        return 0.0
    ledgers = _ledgers(rounds, views, unit)
    if ledgers is None:
        return inf
    return _largest([_choices(ledger, delta) for ledger in ledgers], delta)


def epsilon_by_view(
    rounds: Rounds, messages_hidden: bool, delta: float, unit: str = "client"
) -> dict[str, float]:
    """ε of `unit` for whoever sees messages (their sum, where a secure sum hides them) and whoever sees the
    released aggregate."""
    message = frozenset({"sum"} if messages_hidden else {"message"})
    return {
        "message": epsilon(rounds, message, delta, unit),
        "aggregate": epsilon(rounds, frozenset({"sum", "aggregate"}), delta, unit),
    }


def shared_adjacency(events: Iterable[PrivacyEvent]) -> str:
    """What neighbouring data sets differ in where all of `events` hold together; "zero-out" where there are
    none.

    Zero-out and add-remove go together: putting a contribution to zero moves a sum as far as taking it
    away, so they have the same pairs; the result is stated for zero-out. Replace-one covers zero-out, as a
    null record is a record. Add-remove and replace-one together raise InputError: neighbours of the one
    have different sizes and of the other equal sizes, so no ε would be about both, and which one is meant
    is for the user to say.
    """
    found = {e.adjacency for e in events}
    if {ADD_REMOVE, REPLACE_ONE} <= found:
        raise InputError(
            "adjacency must be the same for all privacy events of a ledger, or zero-out, "
            "got both 'add-remove' and 'replace-one'"
        )
    return found.pop() if len(found) == 1 else ZERO_OUT


def _ledgers(rounds: Rounds, views: frozenset[str], unit: str) -> list[Ledger] | None:
    """The different ledgers of all owners (of the one federation, for clients); None where ε is infinite."""
    by_owner: dict[int | None, Ledger] = defaultdict(Counter)
    shared_adjacency(e for events in rounds for e in events if e.unit == unit and e.view in views)
    for events in rounds:
        of_round: dict[int | None, list[PrivacyEvent]] = defaultdict(list)
        if unit == "client":
            of_round[None] = []
        for e in events:
            if e.unit == unit:
                of_round[e.owner if unit == "example" else None].append(e)
        for owner, own in of_round.items():
            releases = _releases(own, views)
            if UPDATE not in releases or not all(releases.values()):
                return None
            by_owner[owner].update(releases.values())
    if not by_owner:
        return None
    different = {frozenset(ledger.items()): ledger for ledger in by_owner.values()}
    return list(different.values())


def _releases(events: list[PrivacyEvent], views: frozenset[str]) -> dict[str, Release]:
    found: dict[str, dict[Key, None]] = defaultdict(dict)
    for e in events:
        if e.view in views:
            found[e.release].update(dict.fromkeys(_guarantees(e)))
    return {name: tuple(release) for name, release in found.items()}


def _guarantees(event: PrivacyEvent) -> Release:
    try:
        return _remembered(event.event, event.adjacency, event.count)
    except TypeError:
        return _remembered.__wrapped__(event.event, event.adjacency, event.count)


@lru_cache(maxsize=4096)
def _remembered(event: Any, adjacency: str, count: int) -> Release:
    alternatives = costs(PrivacyEvent(event, "", adjacency=adjacency, count=count))
    return tuple(frozenset(spent.items()) for spent in alternatives)


def _choices(ledger: Ledger, delta: float) -> list[Spent]:
    """The ways to count `ledger`: by the first guarantee of each release, by the second, ..., and by the one
    that is best for the release alone. Each is valid, so the smallest ε of them is."""
    longest = max(len(release) for release in ledger)
    ways = [{r: r[min(i, len(r) - 1)] for r in ledger} for i in range(longest)]
    if longest > 1:
        ways.append({r: min(r, key=lambda g: epsilon_by_pld(dict(g), delta)) for r in ledger})
    return [_total(ledger, chosen) for chosen in ways]


def _total(ledger: Ledger, chosen: Mapping[Release, Key]) -> Spent:
    total: Counter[Pair] = Counter()
    for release, times in ledger.items():
        for pair, count in chosen[release]:
            total[pair] += count * times
    return total


def _largest(ledgers: list[list[Spent]], delta: float) -> float:
    """The largest over ledgers of the smallest ε over its choices. A rough upper bound comes first, so that
    only those ledgers are counted to the end which may be the largest."""

    def rough(choices: list[Spent]) -> float:
        return min(epsilon_by_losses(spent, delta, ROUGHLY) for spent in choices)

    curves = any(isinstance(step, Curve) for choices in ledgers for spent in choices for step in spent)
    if len(ledgers) == 1 or delta < SMALLEST_DELTA or curves:
        bounds = [inf] * len(ledgers)
    else:
        bounds = [rough(choices) for choices in ledgers]
    largest = 0.0
    for bound, choices in sorted(zip(bounds, ledgers, strict=True), key=lambda pair: -pair[0]):
        if bound <= largest:
            break
        largest = max(largest, min(epsilon_by_pld(spent, delta) for spent in choices))
    return largest
