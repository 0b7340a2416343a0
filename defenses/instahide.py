"""InstaHide: train on mixtures of k images whose pixels have random signs.

Huang et al. 2020, arXiv:2010.02772, "InstaHide: Instance-hiding Schemes for Private Distributed Learning",
section 3. Each image is mixed with k − 1 others, with coefficients on the simplex that are at most c₁, and
then every pixel's sign is drawn at random. This is the paper's inside-dataset variant, which mixes a client's
own images; its cross-dataset variant takes k − 2 of them from a public set, and a client's inputs meet no
public images here.

Broken: Carlini et al. 2020, arXiv:2011.05315, "Is Private Learning Possible with Instance Encoding?",
recovers the private images from their encodings, taking absolute values to be rid of the signs and finding
which encodings share an image. There is no differential privacy in it either: every view's ε stays infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, isfinite
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.mixing import distributions
from fltoolkit.types import Examples

LEAST_SHARE = 0.01
"""Share of the simplex that a bound on coefficients must leave, since they are drawn until they fit it."""


@dataclass(frozen=True)
class InstaHide(Defense):
    """Mix every example of a client with k − 1 others of the same client, then flip pixels at random.

    x̃ = mid + s ∘ Σ_j λ_j (x_j − mid), ỹ = Σ_j λ_j y_j with one-hot labels, mid = (low + high) / 2. k: images
    in a mixture, the example itself and k − 1 distinct others, all sets being equally likely; a client needs
    at least k. c1: the most that one image counts, so that λ is uniform on {λ ≥ 0, Σ λ = 1, λ ≤ c1}. s: ±1,
    each as likely, for every pixel of every mixture. low, high: the range of inputs, in which mixtures stay.
    classes: the number of classes, by default read off the model's output.

    |x̃ − mid| is exactly that of the convex combination, a pixel's mean over s is mid, and a label's entries
    are in [0, 1] and sum to 1. One encoding a round, the same in all its epochs. Every view's ε stays
    infinite.
    """

    name: ClassVar[str] = "instahide"
    looks_at_data: ClassVar[bool] = True
    k: int = 4
    c1: float = 0.65
    low: float = 0.0
    high: float = 1.0
    classes: int | None = None

    def __post_init__(self) -> None:
        require(self.k >= 2, "k", ">= 2", self.k)
        enough = 0 < self.c1 <= 1 and allowed_share(self.k, self.c1) >= LEAST_SHARE
        bounds = f"at most 1 and far enough above 1 / {self.k} to leave {LEAST_SHARE:.0%} of all mixtures"
        require(enough, "c1", bounds, self.c1)
        good = isfinite(self.low) and isfinite(self.high) and self.low < self.high
        require(good, "low", "below high, both finite", (self.low, self.high))
        require(self.classes is None or self.classes >= 2, "classes", ">= 2", self.classes)

    def inputs(self, data: Examples, ctx: RoundContext, client: int) -> Examples:
        x, y, rng = data.x, distributions(self.name, data, ctx, self.classes), ctx.client_rng(client)
        if len(data) < self.k:
            raise InputError(f"k must be at most the {len(data)} examples of client {client}, got {self.k}")
        members = _sets(len(data), self.k, rng).to(x.device)
        weights = _coefficients(len(data), self.k, self.c1, rng).to(x)
        signs = 1 - 2 * torch.randint(2, x.shape, generator=rng).to(x)
        middle = (self.low + self.high) / 2
        return Examples(
            middle + signs * _combined(x - middle, members, weights), _combined(y, members, weights)
        )


def allowed_share(k: int, most: float) -> float:
    """The share of the simplex of k coefficients where none is above `most`:
    Σ_j (−1)^j C(k, j) max(0, 1 − j · most)^(k−1)."""
    return sum((-1) ** j * comb(k, j) * max(0.0, 1 - j * most) ** (k - 1) for j in range(k + 1))


def _sets(count: int, k: int, rng: torch.Generator) -> Tensor:
    """For each of `count` examples itself and k − 1 distinct others, `[count, k]`.

    Floyd's sampling of a subset, for all examples at once: the j-th draw is among one more than the last, and
    one that was drawn already stands for the newcomer.
    """
    others = torch.empty(count, 0, dtype=torch.long)
    for newcomer in range(count - k, count - 1):
        drawn = torch.randint(newcomer + 1, (count, 1), generator=rng)
        taken = (others == drawn).any(1, keepdim=True)
        others = torch.cat([others, torch.where(taken, newcomer, drawn)], 1)
    own = torch.arange(count)[:, None]
    return torch.cat([own, others + (others >= own)], 1)


def _coefficients(count: int, k: int, most: float, rng: torch.Generator) -> Tensor:
    """Uniform on the simplex where no coefficient is above `most`, `[count, k]`, float64: normalised
    exponentials are uniform on the simplex, and those outside the bound are drawn again."""
    found = torch.full((count, k), float("inf"), dtype=torch.float64)
    while (bad := (found > most).any(1)).any():
        drawn = torch.empty(int(bad.sum()), k, dtype=torch.float64).exponential_(generator=rng)
        found[bad] = drawn / drawn.sum(1, keepdim=True)
    return found


def _combined(values: Tensor, members: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights[i, j] · values[members[i, j]] for every i."""
    total = torch.zeros_like(values)
    for index, weight in zip(members.t(), weights.t(), strict=True):
        total += weight.view(-1, *[1] * (values.dim() - 1)) * values[index]
    return total
