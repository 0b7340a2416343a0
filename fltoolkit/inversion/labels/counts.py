"""The numbers of examples a class by the best linear estimate, from what the adversary's own data look like.

With r = p − y the logit residual of an example, N times the gradient is Σ_n r_n. An example of class c has a
residual with mean A_c and covariance R_c; both are measured on own data (public examples, or random inputs).
So N g = A k + noise for the numbers k `[classes]`, with noise of covariance

    V = Σ_c (N / C) R_c  +  N² B  +  N² σ²

for what differs between examples, what differs between own data and the client's as a whole, and the noise of
a defense. With k a priori uniform with covariance S, multinomial times a factor f >= 1 for how uneven clients
are, the linear minimum mean-square estimate is k₀ + S Aᵀ (A S Aᵀ + V)⁻¹ (N g − A k₀) (Kay 1993, *Estimation
Theory*, theorem 12.1). Where the model is untrained V is next to nothing and k is exact; where own data say
little about the client's, it falls back on what is certain and on the prior. f, and the scale of the update
where it is unknown, are those under which the observation is most likely.

The linear relation of label counts to the last layer's update, with its slope measured on own data, is that
of RLU (Chen, Vikalo 2024, arXiv:2405.00955); the weighting by V, the prior and the bounds are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fltoolkit.inversion.labels.layer import (
    LastLayer,
    defense_names,
    last_layer,
    momentum_factor,
    scale_is_known,
)
from fltoolkit.inversion.labels.own import Own, own_data
from fltoolkit.inversion.labels.rounding import labels_of, whole
from fltoolkit.inversion.noise_level import noise_std
from fltoolkit.types import Observation

BLUR = 0.1
"""Variance that is added to what is believed of a number, for what no covariance knows of: an update of
several steps is not that of one."""

MARGIN = 15.0
"""How much more surprising than the first other labels may be. Where nothing is in doubt, to move one example
costs 2 / BLUR."""

ZEROING = {"topk", "randk", "prune"}
"""Defenses that send a coordinate as 0 to say nothing about it."""


@dataclass(frozen=True)
class Linear:
    """N g = A k + noise: A `[classes, classes]`, its noise covariance V `[classes, classes]`."""

    A: Tensor
    V: Tensor


@dataclass(frozen=True)
class Belief:
    """What is believed of the numbers a class: mean and covariance, what is certain, and their sum."""

    mean: Tensor
    covariance: Tensor
    bounds: Tensor
    number: int

    @property
    def best(self) -> Tensor:
        """The whole numbers above the bounds that are nearest to the mean, int64 `[classes]`."""
        return self.bounds + whole(self.mean - self.bounds, self.number - int(self.bounds.sum()))

    def surprise(self, numbers: Tensor) -> Tensor:
        """(k − mean)ᵀ (covariance + BLUR I)⁻¹ (k − mean) of each k in `numbers [m, classes]`."""
        eye = torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        apart = numbers.to(self.mean) - self.mean
        solved = torch.linalg.solve(self.covariance + BLUR * eye, apart.T).T
        return (apart * solved).sum(1)


def counts(observation: Observation) -> Tensor:
    """Best linear estimate of the numbers a class from own data, above bounds that are certain."""
    return labels_of(belief(observation).best)


def plausible(observation: Observation, most: int) -> Tensor:
    """The most plausible labels `[m, N]`, m at most `most`: those of `counts`, then others by how surprising
    they would be, as long as that is within MARGIN of the first."""
    held = belief(observation)
    first = held.best
    # Best-first search over moves of one example from a class to another; each is a row of `moves`.
    eye = torch.eye(len(first), dtype=torch.long, device=first.device)
    moves = (eye[:, None] - eye[None]).flatten(0, 1)
    found, waiting = [tuple(first.tolist())], dict[tuple[int, ...], float]()
    limit = float(held.surprise(first[None])) + MARGIN
    at, met = first, {found[0]}
    while len(found) < most:
        near = at + moves[((at + moves) >= held.bounds).all(1)]
        for k, surprise in zip(map(tuple, near.tolist()), held.surprise(near).tolist(), strict=True):
            if k not in met and surprise <= limit:
                met.add(k)
                waiting[k] = surprise
        if not waiting:
            break
        found.append(min(waiting, key=lambda k: waiting[k]))
        del waiting[found[-1]]
        at = torch.tensor(found[-1], device=first.device)
    return torch.stack([labels_of(torch.tensor(k, device=first.device)) for k in found])


def belief(observation: Observation) -> Belief:
    """What the update and own data tell of the numbers a class."""
    number, layer, own = observation.num_examples, last_layer(observation), own_data(observation)
    seen = number * layer.logit_gradient
    model = Linear(own.part, noise_covariance(observation, layer, own))
    mean, covariance = _estimate(model, seen, number, scale_is_known(observation))
    bounds = lower_bounds(observation, layer, own)
    if int(bounds.sum()) > number:
        bounds = torch.zeros_like(bounds)
    return Belief(mean, covariance, bounds, number)


def lower_bounds(observation: Observation, layer: LastLayer, own: Own) -> Tensor:
    """Numbers a class that the gradient proves, int64 `[classes]`: at least 1 where an entry can only be
    negative because the class is there, and, where scale and weights of the examples are known, at least −N
    ∇b_c, since the number is N (mean p_c − ∇b_c). 0 where noise or weight decay proves nothing."""
    local, number = observation.local, observation.num_examples
    bounds = torch.zeros_like(layer.bias, dtype=torch.long)
    if "gaussian" in defense_names(observation) or (local is not None and local.weight_decay):
        return bounds
    bias = layer.bias_gradient
    if own.non_negative:
        bounds[layer.weight_gradient.min(1).values < 0] = 1
    if bias is not None:
        bounds[bias < 0] = 1
        if scale_is_known(observation) and local is not None and local.batch is None:
            bounds = torch.maximum(bounds, (-number * bias - 1e-3).ceil().long())
    return bounds


def noise_covariance(observation: Observation, layer: LastLayer, own: Own) -> Tensor:
    """V `[classes, classes]`; see the module. Public examples are taken to be like the client's, so that only
    their finite number blurs B; of random inputs, the client's mean may be as far off as one of them is."""
    number, classes = observation.num_examples, len(layer.bias)
    p = own.softmax * own.factor[:, None]
    eye = torch.eye(classes, dtype=p.dtype, device=p.device)
    within = torch.zeros_like(eye)
    for c, weights in enumerate(own.weights.T):
        r = p - own.factor[:, None] * eye[c]
        r = r - weights @ r
        within += (r * weights[:, None]).T @ r / classes
    between = torch.cov(p.T, correction=0) / (len(p) if own.public else 1)
    noise = number * within + number**2 * between
    noise += number**2 * defense_noise(observation, layer) ** 2 * eye
    unsent = (layer.logit_gradient == 0) & bool(defense_names(observation) & ZEROING)
    noise += torch.diag(unsent.to(p)) * number**2 * 1e3
    return noise


def defense_noise(observation: Observation, layer: LastLayer) -> float:
    """σ, the standard deviation of Gaussian noise on an entry of the logit gradient."""
    std = noise_std(observation)
    if observation.local is not None:
        std /= momentum_factor(observation.local, observation.local_steps)
    return std if layer.bias_gradient is not None else std * sqrt(layer.weight.shape[1])


def _estimate(model: Linear, seen: Tensor, number: int, scale_known: bool) -> tuple[Tensor, Tensor]:
    """k `[classes]` and its covariance under the most likely factor f of 1, 2, 4, ... up to N, and scale."""
    classes = len(seen)
    eye = torch.eye(classes, dtype=seen.dtype, device=seen.device)
    multinomial = number / classes * (eye - 1 / classes)
    prior = torch.full_like(seen, number / classes)
    best, found = -torch.inf, (prior, number * multinomial)
    for f in (2.0**i for i in range(max(1, number).bit_length())):
        covariance = model.A @ (f * multinomial) @ model.A.T + model.V
        covariance += 1e-8 * covariance.trace() / classes * eye  # entries sum to 0, so it is singular
        inverse = torch.linalg.inv(covariance)
        scale = 1.0 if scale_known else likeliest_scale(inverse, seen, model.A @ prior)
        surprise = scale * seen - model.A @ prior
        evidence = -0.5 * float(surprise @ inverse @ surprise + torch.logdet(covariance))
        evidence += 0.0 if scale_known else (classes - 1) * float(torch.tensor(scale).log())
        if evidence > best:
            spread = f * multinomial
            gain = spread @ model.A.T @ inverse
            best, found = evidence, (prior + gain @ surprise, spread - gain @ model.A @ spread)
    return found


def likeliest_scale(inverse: Tensor, seen: Tensor, expected: Tensor) -> float:
    """The t > 0 that maximises d log t − ½ (t seen − expected)ᵀ V⁻¹ (t seen − expected), d = classes − 1
    since entries sum to 0: the density of what was seen when t times it is normal."""
    d = len(seen) - 1
    square, cross = float(seen @ inverse @ seen), float(seen @ inverse @ expected)
    return (cross + sqrt(cross**2 + 4 * d * square)) / (2 * square) if square > 0 else 1.0
