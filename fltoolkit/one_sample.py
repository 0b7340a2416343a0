"""What a round releases beside the update, on the same sample of members as the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fltoolkit.types import UPDATE, PrivacyEvent

SUMMED = ("sum", "aggregate")
"""The views of whoever sees the aggregate."""


def on_one_sample(events: Sequence[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """The events of a round, so that releases may be composed as if each were about a sample of its own.

    Chance hides once who was drawn: two Gaussian releases about one sample are one release of both, which is
    sampled once and costs more than two that are sampled by themselves. So the update's event takes the
    others in, and those cost nothing more. Where one of the update's guarantees has no such partner, whoever
    relies on it may know the sample, and nothing is amplified.
    """
    others = [e for e in events if e.release != UPDATE]
    if not others:
        return tuple(events)
    update = [e for e in events if e.release == UPDATE and e.view in SUMMED and e.unit == others[0].unit]
    protected = [e for e in others if type(e.event).__name__ != "NonPrivateDpEvent"]
    by_release = [
        {_place(e): e for e in protected if e.release == r} for r in dict.fromkeys(e.release for e in others)
    ]
    if not all(_place(u) in own for u in update for own in by_release):
        return _known(events)
    places = {_place(u) for u in update}
    return tuple(
        _with(e, [own[_place(e)] for own in by_release])
        if e in update
        else _free(e)
        if e in protected and _place(e) in places
        else e
        for e in events
    )


def _with(update: PrivacyEvent, others: Sequence[PrivacyEvent]) -> PrivacyEvent:
    """The update's event, with what else is done to the same sample."""
    from dp_accounting import ComposedDpEvent

    together = ComposedDpEvent([_done(e) for e in (update, *others)])
    how = _sampling(update)
    return replace(update, event=type(update.event)(*how, together) if how else together)


def _free(event: PrivacyEvent) -> PrivacyEvent:
    from dp_accounting import NoOpDpEvent

    return replace(event, event=NoOpDpEvent())


def _known(events: Sequence[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """What holds where the sample is known: a Poisson sample's event is that of its members, and of the
    alternatives for one of fixed size the other is left."""
    found = []
    for e in events:
        if len(_sampling(e)) == 1:
            found.append(replace(e, event=_done(e)))
        elif not _sampling(e):
            found.append(e)
    return tuple(found)


def _done(event: PrivacyEvent) -> Any:
    """What is done to the sample, or to everybody."""
    return event.event.event if _sampling(event) else event.event


def _place(e: PrivacyEvent) -> tuple[Any, ...]:
    return (e.view in SUMMED or e.view, e.unit, e.owner, e.count, e.adjacency, _sampling(e))


def _sampling(event: PrivacyEvent) -> tuple[Any, ...]:
    """How a sample was drawn: q of a Poisson one, N and m of a fixed one; nothing where there is none."""
    name, e = type(event.event).__name__, event.event
    if name == "PoissonSampledDpEvent":
        return (e.sampling_probability,)
    if name == "SampledWithoutReplacementDpEvent":
        return (e.source_dataset_size, e.sample_size)
    return ()
