"""What an adversary believes of images before it sees an update.

A prior is called as `prior(x, params, owner)` with guesses x `[S, N, *shape]`, the parameters `[S, D]` at
which their updates are taken and the number of the problem `[S]` that each belongs to. It returns a penalty
`[S]`, differentiable in x, which is added to the matching loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fltoolkit.inversion.spectrum import OPPONENT

Prior = Callable[[Tensor, Tensor, Tensor], Tensor]


def total_variation(x: Tensor, params: Tensor, owner: Tensor) -> Tensor:
    """Mean absolute difference of vertical plus of horizontal neighbours, mean over the batch, `[S]`.

    Rudin et al. 1992 in the anisotropic form that Geiping et al. 2020, arXiv:2003.14053, eq. 4, use. Inputs
    that are not images `[C, H, W]` have none: 0.
    """
    if x.dim() != 5:
        return x.flatten(1).sum(1) * 0
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(1)
    right = (x[..., :, 1:] - x[..., :, :-1]).abs().flatten(1)
    return down.sum(1) / max(1, down.shape[1]) + right.sum(1) / max(1, right.shape[1])


def colour_variation(x: Tensor, params: Tensor, owner: Tensor) -> Tensor:
    """Total variation of luminance, of warm against cool, and four times that of green against magenta, in
    which natural images vary least, `[S]`; plain total variation where there are not three channels."""
    if x.dim() != 5 or x.shape[2] != 3:
        return total_variation(x, params, owner)
    axes = OPPONENT * torch.tensor([[1.0], [1.0], [4.0]])
    return total_variation(torch.einsum("ij,snjhw->snihw", axes.to(x), x), params, owner)


def norm(x: Tensor, params: Tensor, owner: Tensor) -> Tensor:
    """Mean over the batch of ‖x_n‖₂, `[S]` (Yin et al. 2021, arXiv:2104.07586, eq. 9)."""
    return x.flatten(2).norm(dim=2).mean(1)


@dataclass(frozen=True)
class Outside:
    """Mean squared distance of the inputs from the range low..high, `[S]`."""

    low: float
    high: float

    def __call__(self, x: Tensor, params: Tensor, owner: Tensor) -> Tensor:
        return (x - x.clamp(self.low, self.high)).square().flatten(1).mean(1)
