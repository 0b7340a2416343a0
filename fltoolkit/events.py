"""The privacy events of a Gaussian mechanism on a sum, by how its members were chosen."""

from __future__ import annotations

from typing import Any

from fltoolkit.defense import RoundContext
from fltoolkit.types import UPDATE, PrivacyEvent


def central_gaussian(sigma: float, ctx: RoundContext, release: str = UPDATE) -> tuple[PrivacyEvent, ...]:
    """Noise of standard deviation sigma · C on a sum of rows that are at most C long each.

    For clients, the server adds it before release, so it protects whoever sees the aggregate. A cohort of
    fixed size has two alternative guarantees: its members counted as taking part for certain, and the
    amplification by sampling without replacement, which holds for replacing a client, not for adding one, and
    where all of the population count alike. For
    examples the client adds the noise, in each of its steps, so every view of its message is protected.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SampledWithoutReplacementDpEvent

    plain, how = GaussianDpEvent(sigma), ctx.sampling
    if how.kind == "poisson":
        return _of(PoissonSampledDpEvent(how.rate, plain), ctx, release, "add-remove")
    found = _of(plain, ctx, release, "zero-out")
    if how.kind == "fixed" and how.alike:
        chosen = round(how.rate * how.population)
        amplified = SampledWithoutReplacementDpEvent(how.population, chosen, plain)
        found += _of(amplified, ctx, release, "replace-one")
    return found


def _of(event: Any, ctx: RoundContext, release: str, adjacency: str) -> tuple[PrivacyEvent, ...]:
    if ctx.owner is None:
        return (PrivacyEvent(event, "aggregate", release=release, adjacency=adjacency),)
    return tuple(
        PrivacyEvent(event, view, "example", release, adjacency, ctx.owner, ctx.steps)
        for view in ("message", "sum")
    )
