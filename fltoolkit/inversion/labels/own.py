"""What the adversary's own data look like to the model: public examples, or random inputs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fltoolkit.errors import InputError
from fltoolkit.inversion.labels.layer import layer_names, path
from fltoolkit.types import Observation

DUMMIES = 256
SEED = 0
MOST_PUBLIC = 2048


@dataclass(frozen=True)
class Own:
    """softmax `[n, classes]`: p(x), mean over the path of the local steps. factor `[n]`: what the logit
    gradient of an example is multiplied by to give its part of `logit_gradient`: 1 with a bias, else the sum
    of its features. weights `[n, classes]`: how much input i counts for class c, columns sum to 1.
    non_negative: whether no feature was negative. public: whether inputs are public examples.
    """

    softmax: Tensor
    factor: Tensor
    weights: Tensor
    non_negative: bool
    public: bool

    @property
    def part(self) -> Tensor:
        """E[factor · (p − e_c)] for an example of class c, as column c `[classes, classes]`."""
        return (self.softmax * self.factor[:, None]).T @ self.weights - torch.diag(self.factor @ self.weights)


def own_data(observation: Observation) -> Own:
    """Public examples where there are any, otherwise random inputs; deterministic.

    A random input has no label. It counts for class c as much as the model itself believes in c, which says
    nothing about an untrained model and something about a trained one. A public example counts for its label,
    and a little for every other, so that a class without examples has an estimate too.
    """
    public = observation.auxiliary
    if public is None or len(public) == 0:
        x, y = dummies(observation), None
    else:
        x, y = public.x[:MOST_PUBLIC].to(observation.params.device), public.y[:MOST_PUBLIC]
    softmax, factor, non_negative = _along_path(observation, x)
    if y is None:
        weights = softmax + 1e-6
    else:
        one_hot = nn.functional.one_hot(y.to(softmax.device), observation.num_classes)
        weights = one_hot.to(softmax) + 1 / len(x)
    return Own(softmax, factor, weights / weights.sum(0), non_negative, y is not None)


def dummies(observation: Observation) -> Tensor:
    """Random inputs `[DUMMIES, *input_shape]` within the range: one half white noise of random brightness,
    the other (of images) smooth patches of random brightness."""
    generator = torch.Generator().manual_seed(SEED)
    low, high = observation.input_range
    shape, half = observation.input_shape, DUMMIES // 2
    level = (half, *[1] * len(shape))
    noise = torch.rand(half, *shape, generator=generator) * torch.rand(level, generator=generator)
    if len(shape) == 3:
        coarse = torch.randn(half, shape[0], 7, 7, generator=generator)
        patches = nn.functional.interpolate(coarse, shape[1:], mode="bilinear", align_corners=False)
    else:
        patches = torch.randn(half, *shape, generator=generator)
    smooth = (2 * patches + torch.randn(level, generator=generator)).sigmoid()
    return (low + (high - low) * torch.cat([noise, smooth])).to(observation.params)


def _along_path(observation: Observation, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    bias = layer_names(observation)[1]
    softmax, factor, lowest = [], [], []
    for s in path(observation):
        features, logits = _features(observation, observation.params + s * observation.update, x)
        softmax.append(logits.softmax(-1))
        factor.append(features.sum(1) if bias is None else torch.ones_like(features[:, 0]))
        lowest.append(float(features.min()))
    return torch.stack(softmax).mean(0), torch.stack(factor).mean(0), min(lowest) >= 0


@torch.no_grad()
def _features(observation: Observation, row: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the last layer `[n, features]` and what comes out `[n, classes]`, float64, of a copy
    of the model in evaluation mode with the parameters in `row`."""
    model = deepcopy(observation.model).eval()
    for name, value in observation.layout.unflatten(row).items():
        model.get_parameter(name).copy_(value)
    layer = model.get_submodule(layer_names(observation)[0].rpartition(".")[0])
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = model(x)
    except RuntimeError as e:
        got = f"{x.dtype} of shape {tuple(x.shape[1:])}"
        raise InputError(f"own data must be inputs that the model takes, got {got}: {e}") from e
    if logits.shape != (len(x), observation.num_classes) or len(seen) != 1 or seen[0].dim() != 2:
        raise InputError(
            f"model must end in a linear layer that gives logits [N, {observation.num_classes}], "
            f"got an output of shape {tuple(logits.shape)}"
        )
    return seen[0].double(), logits.double()
