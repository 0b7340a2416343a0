"""What an adversary believes of images before it sees an update.

A prior is called as `prior(x, params, owner)` with guesses x `[S, N, *shape]`, the parameters `[S, D]` at
which their updates are taken and the number of the problem `[S]` that each belongs to. It returns a penalty
`[S]`, differentiable in x, which is added to the matching loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fltoolkit.errors import InputError
from fltoolkit.inversion.spectrum import OPPONENT
from fltoolkit.types import Observation

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


class BatchNormStatistics:
    """Σ_l ‖μ_l(x) − μ̂_l‖₂ + ‖σ²_l(x) − σ̂²_l‖₂ over the BatchNorm layers l, whose inputs have means μ_l and
    variances σ²_l over the batch (Yin et al. 2021, arXiv:2104.07586, eq. 10).

    The paper takes the running statistics of a trained model for μ̂, σ̂² ("running"). Huang et al. 2021,
    arXiv:2112.00059, section 3, point out that they need not be the batch's; "estimated" measures them on
    public data instead, at the parameters of the round. InputError where there is nothing to compare with.
    """

    SOURCES = ("running", "estimated")

    def __init__(self, observations: Sequence[Observation], source: str) -> None:
        first = observations[0]
        self.model, self.layout = first.model, first.layout
        self.layers = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        if not self.layers:
            raise InputError("statistics must be none for a model without BatchNorm2d layers, got " + source)
        self.targets = torch.stack([self._target(o, source) for o in observations])

    def __call__(self, x: Tensor, params: Tensor, owner: Tensor) -> Tensor:
        buffers = {n: b.expand(len(x), *b.shape).clone() for n, b in self.model.named_buffers()}
        found = vmap(self._of_batch)(params, buffers, x)
        sizes = [m.num_features for m in self.layers for _ in range(2)]
        pieces = (found - self.targets[owner]).split(sizes, dim=1)
        return torch.stack([(p.square().sum(1) + 1e-12).sqrt() for p in pieces]).sum(0)

    def _of_batch(self, params: Tensor, buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        """`[Σ 2 C_l]`: mean and variance, layer by layer, of what enters the layers at parameters `[D]` when
        the model sees the batch x `[N, *shape]`. Layers normalise as they do in the mode that the model is
        in."""
        seen: list[Tensor] = []

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].transpose(0, 1).flatten(1)
            seen.extend((flat.mean(1), flat.var(1, correction=0)))

        hooks = [m.register_forward_pre_hook(note) for m in self.layers]
        try:
            functional_call(self.model, ({**self.layout.unflatten(params)}, buffers), (x,))
        finally:
            for h in hooks:
                h.remove()
        return torch.cat(seen)

    def _target(self, o: Observation, source: str) -> Tensor:
        if source == "running":
            layers = [m for m in o.model.modules() if isinstance(m, nn.BatchNorm2d)]
            pairs = [(m.running_mean, m.running_var) for m in layers]
            return torch.cat([t for pair in pairs for t in pair if t is not None])
        if o.auxiliary is None:
            raise InputError("statistics=estimated must have public auxiliary data, got none")
        with torch.no_grad():
            buffers = {n: b.clone() for n, b in o.model.named_buffers()}
            return self._of_batch(o.params, buffers, o.auxiliary.x[:512].to(o.params))
