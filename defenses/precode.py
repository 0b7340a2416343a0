"""PRECODE: a variational bottleneck before the last layer, so that gradients depend on noise.

Scheliga et al. 2022, arXiv:2108.04725, "PRECODE: A Generic Model Extension to Prevent Deep Gradient Leakage",
section 3. The features r that enter the last layer pass an encoder to μ and σ, are replaced by a draw
z ~ N(μ, σ²), and pass a decoder back to their old size; the loss gains β KL(N(μ, σ²) ‖ N(0, 1)). Encoder and
decoder are linear layers, and the output layer is the model's own. The paper leaves open how σ is kept
positive; here σ = softplus of the encoder's second half.

The noise makes the gradients of the bottleneck, and of what follows it, random. It promises no ε: nothing
bounds what one example changes, and every view's ε stays infinite. Gradients before the bottleneck are left
almost as they were, and an attack that matches those alone recovers inputs (Scheliga et al. 2022,
arXiv:2208.04767); where the first layer is linear it need not even search (Balunović et al. 2022,
arXiv:2111.04706).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fltoolkit.defense import Defense
from fltoolkit.errors import InputError, require
from fltoolkit.models import evaluating
from fltoolkit.rng import torch_stream


@dataclass(frozen=True)
class Precode(Defense):
    """Train the model with a variational bottleneck of size k before its last layer, under β · KL.

    size: k, the entries of z. beta: β ≥ 0. In training mode the forward pass draws from PyTorch's global
    generator, which the training engine seeds for each client. In evaluation mode z = μ and there is no
    penalty, so that test accuracy is a number and not a draw (the paper draws there too). Every view's ε
    stays infinite.

    The new layers start uniform within ± 1 / sqrt(fan in), as PyTorch's default is, from the stream
    `torch_stream(0, "precode")` whatever the run's seed, since a model is built without one. The old layers
    keep their weights and their names, but for the last, NAME, which becomes NAME.last behind NAME.encoder
    and NAME.decoder.
    """

    name: ClassVar[str] = "precode"
    size: int = 256
    beta: float = 1e-3

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", ">= 1", self.size)
        require(isfinite(self.beta) and self.beta >= 0, "beta", "a finite number >= 0", self.beta)

    def model(self, model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """A copy of `model` whose last layer is a Bottleneck; InputError where it does not end in a linear
        layer."""
        model = deepcopy(model)
        name = _last_layer(model, input_shape)
        last = model.get_submodule(name)
        assert isinstance(last, nn.Linear)
        bottleneck = Bottleneck(last, self.size, self.beta, torch_stream(0, "precode"))
        if not name:
            return bottleneck
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, bottleneck)
        return model


class Bottleneck(nn.Module):
    """Features r `[N, d]` -> μ, σ `[N, k]` -> z `[N, k]` -> logits `[N, classes]` of the layer `last`.

    In training mode the logits carry the penalty β · KL `[N]` of each example as their attribute `penalty`,
    which `fltoolkit.loss.cross_entropy` adds. So it is weighted exactly as the loss is, and differentiated as
    often: adding a gradient of its own on the way back would be simpler to hide in a model, but wrong for
    whoever differentiates twice, since the second backward pass would add it again.
    """

    draws = True

    def __init__(self, last: nn.Linear, size: int, beta: float, rng: torch.Generator) -> None:
        super().__init__()
        self.encoder = _linear(last.in_features, 2 * size, last.weight, rng)
        self.decoder = _linear(size, last.in_features, last.weight, rng)
        self.last, self.beta = last, beta
        self.train(last.training)

    def forward(self, r: Tensor) -> Tensor:
        mean, raw = self.encoder(r).chunk(2, -1)
        if not self.training:
            logits: Tensor = self.last(self.decoder(mean))
            return logits
        std = F.softplus(raw)
        logits = self.last(self.decoder(mean + std * torch.randn_like(std)))
        logits.penalty = self.beta * divergence(mean, std)  # type: ignore[attr-defined]
        return logits


def divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) = ½ Σ (μ² + σ² − 1 − ln σ²) in nats, of each row: `[N, k]` -> `[N]`."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(-1)


def _linear(inputs: int, outputs: int, like: Tensor, rng: torch.Generator) -> nn.Linear:
    """A new layer on the device of `like`, from `rng` alone."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=like.device, dtype=like.dtype)
    bound = 1 / sqrt(inputs)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=rng))
    assert isinstance(layer, nn.Linear)
    return layer


def _last_layer(model: nn.Module, input_shape: tuple[int, ...]) -> str:
    """The name of the linear layer whose output is the model's, tried in evaluation mode."""
    made: dict[str, list[Tensor]] = {n: [] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda _m, _x, out, n=n: made[n].append(out))
        for n in made
    ]
    try:
        with evaluating(model), torch.no_grad():
            logits = model(torch.zeros(2, *input_shape, device=next(model.parameters()).device))
    except Exception as e:  # a user's forward pass may raise anything
        raise InputError(f"model must accept real inputs of shape {input_shape} for precode, got: {e}") from e
    finally:
        for h in hooks:
            h.remove()
    for name, outputs in made.items():
        if len(outputs) == 1 and outputs[0] is logits and logits.dim() == 2:
            return name
    raise InputError(
        "model must give the output of a linear layer, called once, as its logits for precode, "
        f"got {type(model).__name__}"
    )
