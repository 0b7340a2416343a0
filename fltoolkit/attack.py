"""What an attack is: `attack(observation, rng) -> Reconstruction`, hyperparameters at construction.

An attack that can work on many observations at once overrides `many`; the audit calls that. Each
observation comes with its own generator, so a victim's numbers do not depend on who else is attacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fltoolkit.threat import ThreatModel
from fltoolkit.types import Observation, Reconstruction

Progress = Callable[[int, int, str], None]
"""`progress(iteration, of, text)`: called now and then while an attack runs; may be ignored."""


def silent(iteration: int, of: int, text: str) -> None:
    """The progress of nobody watching."""


@dataclass(frozen=True)
class Attack:
    """Base of all attacks. Subclasses are frozen dataclasses whose fields are the command line's options."""

    name: ClassVar[str] = ""

    def threat(self) -> ThreatModel | None:
        """The adversary that this attack takes, where it is one that does more than look; None: any."""
        return None

    def __call__(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Attack one observation."""
        return self.many([observation], [rng])[0]

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        """Attack several observations of one shape, in their order. One of the two must be overridden."""
        found = []
        for i, (observation, rng) in enumerate(zip(observations, rngs, strict=True)):
            progress(i, len(observations), "victims done")
            found.append(self(observation, rng))
        return found


def grey(x: Tensor, y: Tensor, input_range: tuple[float, float], note: str) -> Reconstruction:
    """The guess of an adversary that saw nothing: middle grey in the shape of `x`, class 0 in that of `y`."""
    middle = torch.full_like(x, sum(input_range) / 2)
    return Reconstruction(middle, torch.zeros_like(y), float("inf"), note=note)


Item = TypeVar("Item")


def grouped(items: Sequence[Item], together: Callable[[Item, Item], bool]) -> list[list[int]]:
    """Positions of the observations, or of what tells them apart, that share a piece of work, group by group;
    `together(a, b)` says whether two do."""
    groups: list[list[int]] = []
    for i, item in enumerate(items):
        home = next((g for g in groups if together(items[g[0]], item)), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return groups
