"""mixup: train on convex combinations of pairs of examples and of their labels.

Zhang et al. 2018, arXiv:1710.09412, "mixup: Beyond Empirical Risk Minimization", section 2: λ ~ Beta(α, α),
x̃ = λ x_i + (1 − λ) x_j, ỹ = λ y_i + (1 − λ) y_j with one-hot labels. Meant to regularise; as a defense it
hides an input behind another of the same client, and what an attack recovers is the mixture. It gives no
differential privacy: every view's ε stays infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import require
from fltoolkit.mixing import distributions
from fltoolkit.types import Examples


@dataclass(frozen=True)
class Mixup(Defense):
    """Mix every example of a client with another of the same client: λ x_i + (1 − λ) x_j, λ ~ Beta(α, α).

    alpha: α > 0; 1 makes λ uniform, small values leave one of the two almost alone. classes: the number of
    classes, by default read off the model's output. Every output is a convex combination of two of the
    client's inputs, and its label `[classes]` the same combination of their one-hot labels: entries in [0, 1]
    that sum to 1. Partners j are a random permutation of the examples, and λ is drawn anew for each, so that
    the mean of inputs and of labels is kept on average over λ. A permutation may map an example to itself (a
    client with one example always does), which is then sent as it was. One mixture a round, the same in all
    its epochs. Every view's ε stays infinite.
    """

    name: ClassVar[str] = "mixup"
    looks_at_data: ClassVar[bool] = True
    alpha: float = 1.0
    classes: int | None = None

    def __post_init__(self) -> None:
        require(isfinite(self.alpha) and self.alpha > 0, "alpha", "a finite number > 0", self.alpha)
        require(self.classes is None or self.classes >= 2, "classes", ">= 2", self.classes)

    def inputs(self, data: Examples, ctx: RoundContext, client: int) -> Examples:
        y, rng = distributions(self.name, data, ctx, self.classes), ctx.client_rng(client)
        partner = torch.randperm(len(data), generator=rng).to(data.x.device)
        numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
        share = torch.from_numpy(numbers.beta(self.alpha, self.alpha, len(data))).to(data.x)
        return Examples(_mix(data.x, data.x[partner], share), _mix(y, y[partner], share))


def _mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """share · a + (1 − share) · b, with one share for each of the first dimension."""
    share = share.view(-1, *[1] * (a.dim() - 1))
    return share * a + (1 - share) * b
