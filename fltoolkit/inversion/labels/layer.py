"""The last layer: what was observed of it, and in what units."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fltoolkit.errors import InputError, require
from fltoolkit.inversion.adaptation import keeps_length
from fltoolkit.types import LocalSpec, Observation

MASKS = {"topk", "randk", "prune", "subspace", "suppression"}
"""Defenses that send some coordinates and leave others out, and the attack that knows some only."""


@dataclass(frozen=True)
class LastLayer:
    """weight `[classes, features]` and bias `[classes]` of the broadcast; what they moved by in the update;
    and the gradients of the mean loss by them, float64. Without a bias, bias_gradient is None, bias and
    bias_update are 0.

    The gradients are means over the local steps, up to one factor where the scale is unknown.
    """

    weight: Tensor
    bias: Tensor
    weight_update: Tensor
    bias_update: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor | None

    @property
    def logit_gradient(self) -> Tensor:
        """As the function of this name, `[classes]`."""
        return self.weight_gradient.sum(1) if self.bias_gradient is None else self.bias_gradient


def logit_gradient(observation: Observation) -> Tensor:
    """The gradient of the loss by each logit, summed over the batch, up to one positive factor `[classes]`.

    It is the last layer's bias gradient where there is a bias. Without one, the sum over inputs of the
    weight gradient has the same sign where that layer's inputs are non-negative (Zhao et al. 2020,
    arXiv:2001.02610, section 3.1). Raises InputError where the model does not end in such a layer.
    """
    gradients = observation.layout.unflatten(observation.gradient)
    weight, bias = layer_names(observation)
    return gradients[weight].sum(1) if bias is None else gradients[bias]


def labels_hidden(observation: Observation) -> bool:
    """Whether a defense sent so little of the last bias' gradient that no label shows: entries are missing,
    and what is left of their sum, which would be 0, is not negative."""
    layout = observation.layout
    if not defense_names(observation) & MASKS or layout.shapes[-1] != (observation.num_classes,):
        return False
    g = layout.unflatten(observation.gradient)[layout.names[-1]]
    return bool((g == 0).any()) and float(g.sum()) >= 0


def layer_names(observation: Observation) -> tuple[str, str | None]:
    """The names of the last layer's weight and, where there is one, bias; InputError where it is not linear
    with one output a class."""
    layout, classes = observation.layout, observation.num_classes
    require(observation.num_examples >= 1, "num_examples", ">= 1", observation.num_examples)
    last, shape = layout.names[-1], layout.shapes[-1]
    bias = last if shape == (classes,) else None
    at = -1 if bias is None else -2
    if len(layout.names) >= -at:
        last, shape = layout.names[at], layout.shapes[at]
        if len(shape) == 2 and shape[0] == classes:
            return last, bias
    raise InputError(
        f"model must end in a linear layer with {classes} outputs to infer labels, "
        f"got {last!r} of shape {tuple(shape)} as its last parameter"
    )


def last_layer(observation: Observation) -> LastLayer:
    """The last layer as observed. Where the scale is known, momentum and weight decay are taken out."""
    weight, bias = layer_names(observation)
    params = observation.layout.unflatten(observation.params.double())
    moved = observation.layout.unflatten(observation.update.double())
    read = observation.layout.unflatten(_mean_gradient(observation))
    none = torch.zeros_like(params[weight][:, 0])
    return LastLayer(
        weight=params[weight],
        bias=none if bias is None else params[bias],
        weight_update=moved[weight],
        bias_update=none if bias is None else moved[bias],
        weight_gradient=read[weight],
        bias_gradient=None if bias is None else read[bias],
    )


def _mean_gradient(observation: Observation) -> Tensor:
    """The mean over local steps of the gradient without λ w, `[D]`.

    With v ← μ v + g, the gradient of step j of u acts (1 − μ^(u − j + 1)) / (1 − μ) times, so the update is
    that sum of gradients; here they are taken as equal. λ w is taken at the middle of the path.
    """
    gradient = observation.gradient.double()
    local = observation.local
    if local is None or not scale_is_known(observation):
        return gradient
    u = observation.local_steps
    gradient = gradient / momentum_factor(local, u)
    middle = observation.params.double() + (u - 1) / (2 * u) * observation.update.double()
    return gradient - local.weight_decay * middle


def momentum_factor(local: LocalSpec, steps: int) -> float:
    """How many times larger momentum makes an update of `steps` equal gradients."""
    mu = local.momentum
    return sum((1 - mu**j) / (1 - mu) for j in range(1, steps + 1)) / steps if 0 < mu < 1 else 1.0


def defense_names(observation: Observation) -> set[str]:
    return {str(d["name"]) for d in observation.defenses}


def scale_is_known(observation: Observation) -> bool:
    """Whether the update has its natural length: the recipe is known and no defense changed it."""
    return observation.local is not None and keeps_length(observation)


def path(observation: Observation, most: int = 8) -> list[float]:
    """Points s in [0, 1) at which the local steps took their gradients, on the line from the broadcast to
    broadcast + update: t / u for step t of u, at most `most` of them. Steps of equal length on a straight
    line are an approximation; of several clients, only the mean of their paths is seen. Under noise the line
    leads nowhere, so only its start is used."""
    u = observation.local_steps
    if "gaussian" in defense_names(observation):
        return [0.0]
    if u <= most:
        return [t / u for t in range(u)]
    return [(i + 0.5) / most * (u - 1) / u for i in range(most)]
