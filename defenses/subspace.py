"""Gradient masking: clients send only the part of an update that lies in a random subspace.

Konečný et al. 2016, arXiv:1610.05492, section 2 (random masks that a seed announces) and section 3 (rotations
by random signs and a Walsh-Hadamard transform before coordinates are dropped). The server announces the
subspace, the same for all clients of a round, so everybody knows it. It therefore has a seed of its own, an
option, instead of a stream under the run's seed, which names everybody's secret noise and can never be
published.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import require
from fltoolkit.rng import torch_stream

KINDS = ("mask", "rotate")


@dataclass(frozen=True)
class Subspace(Defense):
    """Send only the part of each update in a public random subspace, a new one every round.

    fraction: in (0, 1]; the subspace has d = max(1, round(fraction · D)) dimensions. kind: "mask" (d of the D
    coordinates) or "rotate" (d of the coordinates after a random rotation, and back, so that every entry
    changes). seed: public; with the number of the round it gives the subspace, see `projection`. Guaranteed:
    the output is P Pᵀ row with d orthonormal columns P, so projecting again changes nothing, no row gets
    longer, ‖row − P Pᵀ row‖² = ‖row‖² − ‖P Pᵀ row‖², and over the seed E P Pᵀ = (d/D) I. No differential
    privacy: every view's ε stays infinite.
    """

    name: ClassVar[str] = "subspace"
    fraction: float = 0.1
    kind: str = "mask"
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "fraction", "in (0, 1]", self.fraction)
        require(self.kind in KINDS, "kind", f"one of {KINDS}", self.kind)
        require(self.seed >= 0, "seed", ">= 0", self.seed)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        return self.projection(rows.shape[1], ctx.round)(rows)

    def projection(self, size: int, number: int) -> Projection:
        """P Pᵀ of round `number` on rows of `size` entries, which whoever knows the options can compute."""
        kept = max(1, round(self.fraction * size))
        return Projection(size, kept, self.kind == "rotate", self.seed, number)


@dataclass(frozen=True)
class Projection:
    """Rows `[K, size]` -> P Pᵀ rows, linear and symmetric, onto `kept` dimensions."""

    size: int
    kept: int
    rotated: bool
    seed: int
    number: int

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Which coordinates are kept `[size]`, and two times random signs `[2, size]`."""
        rng = torch_stream(self.seed, "subspace", self.number)
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[torch.randperm(self.size, generator=rng)[: self.kept]] = True
        return mask, 1 - 2 * torch.randint(2, (2, self.size), generator=rng)

    def __call__(self, rows: Tensor) -> Tensor:
        mask, signs = (t.to(rows.device) for t in self._drawn)
        if not self.rotated:
            return rows * mask
        return back(rotated(rows, signs.to(rows.dtype)) * mask, signs.to(rows.dtype))


def rotated(rows: Tensor, signs: Tensor) -> Tensor:
    """Rows `[K, D]` rotated: signs flip, the first n entries are transformed, n the largest power of two ≤ D,
    signs flip again, and so are the last n. Every entry is in one of the two, so none stays where it was."""
    n = 1 << (rows.shape[1].bit_length() - 1)
    rows = rows * signs[0]
    rows = torch.cat([hadamard(rows[:, :n]), rows[:, n:]], dim=1) * signs[1]
    return torch.cat([rows[:, :-n], hadamard(rows[:, -n:])], dim=1)


def back(rows: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotated`, which is its transpose."""
    n = 1 << (rows.shape[1].bit_length() - 1)
    rows = torch.cat([rows[:, :-n], hadamard(rows[:, -n:])], dim=1) * signs[1]
    return torch.cat([hadamard(rows[:, :n]), rows[:, n:]], dim=1) * signs[0]


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of `x [K, n]`, n a power of two, in n log n steps. It is its
    own inverse."""
    n, h = x.shape[1], 1
    while h < n:
        a, b = x.unflatten(1, (-1, 2, h)).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).flatten(1)
        h *= 2
    return x * n**-0.5
