"""Attacks that first get one client's update out of a sum, and leave the rest to another attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fltoolkit.attack import Attack, Progress, grey, silent
from fltoolkit.registry import make_attack
from fltoolkit.types import Observation, Reconstruction


@dataclass(frozen=True)
class Exposing(Attack):
    """Base of these attacks. inner: the attack, with its options, that inverts what was exposed. steps,
    restarts: of the inner attack."""

    inner: str = "inverting"
    steps: int | None = None
    restarts: int | None = None

    def expose(self, observation: Observation) -> tuple[Observation | None, str]:
        """The observation of one client that is in `observation`, None where it cannot be had, and in words
        how it was got or why not."""
        return observation, ""

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        inner = make_attack(self.inner, steps=self.steps, restarts=self.restarts)
        exposed = [self.expose(o) for o in observations]
        seen = [(o, rng) for (o, _), rng in zip(exposed, rngs, strict=True) if o is not None]
        found = iter(inner.many([o for o, _ in seen], [rng for _, rng in seen], progress) if seen else [])
        return [
            _nothing(whole, words) if o is None else _with(next(found), words)
            for whole, (o, words) in zip(observations, exposed, strict=True)
        ]


def _with(found: Reconstruction, words: str) -> Reconstruction:
    return replace(found, adaptation="; ".join(w for w in (words, found.adaptation) if w))


def _nothing(observation: Observation, words: str) -> Reconstruction:
    """Grey images, where no update was exposed."""
    n = observation.per_client
    x, y = torch.empty(n, *observation.input_shape), torch.empty(n, dtype=torch.long)
    return replace(grey(x, y, observation.input_range, words), adaptation=words)
