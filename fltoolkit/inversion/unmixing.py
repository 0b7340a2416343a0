"""The features of each class in a batch, off the last layer's gradient, and searches for what has them.

The gradient of the last weights is AᵀH for N examples under cross-entropy, where row n of H is what enters
the layer, h(x_n), and row n of A is (p_n − e_{y_n}) / N. Labels give e; p = softmax(W h + b) follows from h,
so A and H are found in turn. Examples of one label have nearly equal rows of A and stay a mean. Kariyappa et
al. 2022, arXiv:2209.05578, unmix an aggregate by independent component analysis and then invert features;
knowing labels makes that a linear system.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fltoolkit.inversion.labels.layer import last_layer, layer_names
from fltoolkit.inversion.prior import Prior
from fltoolkit.types import Observation

TURNS = 50
"""Between A and H; from p uniform they settle within a few for untrained networks."""

TINY = 1e-30


def unmixing(observation: Observation, labels: Tensor) -> Tensor:
    """`[m, classes]`: times the last weights' gradient `[classes, features]` it gives the mean features of
    each of the m classes in `labels [N]`, in increasing order."""
    layer, classes = last_layer(observation), observation.num_classes
    present, counts = labels.unique(return_counts=True)
    own = F.one_hot(present, classes).to(layer.weight)
    share = (counts / len(labels)).to(layer.weight)[:, None]
    p, inverse = torch.full_like(own, 1 / classes), own
    for _ in range(TURNS):
        inverse = torch.linalg.pinv((share * (p - own)).T)
        p = 0.5 * (p + torch.softmax(inverse @ layer.weight_gradient @ layer.weight.T + layer.bias, 1))
    return inverse.to(observation.params)


class FeatureSearch:
    """S ‖h(x_s) − ĥ_s‖² / Σ_r ‖ĥ_r − h(gray)_r‖² and priors, of S single inputs at once: an objective for
    `LBFGS`, whose row r is a guess at input r mod S.

    What is wrong with ĥ is as large for an input that is nearly gray as for the others, so all have one unit.
    wanted `[S, features]`: ĥ. gray `[S, *shape]`: where the misfit is 1 on average.
    """

    def __init__(self, observation: Observation, gray: Tensor, priors: Sequence[tuple[float, Prior]]) -> None:
        self.observation, self.priors = observation, priors
        weight, _ = layer_names(observation)
        self._layer = observation.model.get_submodule(weight.rpartition(".")[0])
        self._weights = observation.layout.unflatten(observation.params)
        self.at_gray = self.features(gray).detach()
        self.wanted = self.at_gray

    def features(self, x: Tensor) -> Tensor:
        """h(x) `[S, features]` of x `[S, *shape]` at the broadcast."""
        seen: list[Tensor] = []
        model = self.observation.model
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        hook = self._layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            functional_call(model, ({**self._weights}, buffers), (x,))
        finally:
            hook.remove()
        return seen[0]

    def __call__(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The objective `[S]` and its gradient `[S, n]` at the flat inputs z `[S, n]`."""
        z = z.detach().requires_grad_()
        x, rows = z.view(-1, *self.observation.input_shape), rows % len(self.wanted)
        unit = (self.wanted - self.at_gray).square().sum(1).mean().clamp_min(TINY)
        loss = (self.features(x) - self.wanted[rows]).square().sum(1) / unit
        for weight, prior in self.priors:
            loss = loss + weight * prior(x[:, None], self.observation.params[None], rows)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        return loss.detach(), gradient
