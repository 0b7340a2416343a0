"""How an attack takes public defenses into account (Kerckhoffs: defenses are no secret, noise draws are).

Each known defense changes the distance between updates: a clip hides the scale, sparsification hides
coordinates, sign compression hides magnitudes, and Gaussian noise of known size says how much a distance
counts against what the adversary believes of images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf, isfinite, prod, sqrt
from typing import Any

import torch

from fltoolkit.inversion.distance import (
    SCALE_FREE,
    Distance,
    First,
    Masked,
    Parts,
    Signs,
    Times,
    cosine,
    scaled,
)
from fltoolkit.inversion.prior import total_variation
from fltoolkit.types import Observation

TYPICAL_VARIATION = 0.05
"""Mean absolute difference of neighbouring pixels in natural images at 32x32, in units of the range: the
scale of a Laplace prior on such differences, where no public images say better."""

KEEP_LENGTH = {"clip", "secagg", "gaussian"}
"""Defenses that do not change the length of an update, a clip where it does not act."""


@dataclass(frozen=True)
class Adaptation:
    """distance: what to match with. tv: weight of total variation beside it. strength: what other weights
    beside the distance grow by. words: what was done, one entry a defense."""

    distance: Distance
    tv: float
    strength: float = 1.0
    words: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        return "; ".join(self.words)


Rule = Callable[[Adaptation, Mapping[str, Any], Observation], Adaptation]


def adapt(observation: Observation, distance: Distance, tv: float, known: bool = True) -> Adaptation:
    """Fit `distance` to every defense that is known here, in their order; known=False leaves it alone.

    tv: weight of total variation beside `distance`, for inputs in [0, 1]; under noise both are replaced by a
    negative log-likelihood and a Laplace prior on pixel differences, whose ratio is not free.
    """
    low, high = observation.input_range
    found = Adaptation(distance, tv / (high - low))
    if not known:
        return found
    for defense in observation.defenses:
        rule = RULES.get(str(defense["name"]))
        if rule is not None:
            found = rule(found, defense, observation)
    if observation.clients > 1:
        words = f"all {observation.num_examples} inputs of {observation.clients} clients searched together"
        found = replace(found, words=(*found.words, words))
    return found


def keeps_length(observation: Observation) -> bool:
    """Whether no defense changed the length of the update.

    A clip changes nothing where one client's update came out shorter than the norm. Where several are mixed,
    each may have been clipped. Noise alone leaves the length right on average.
    """
    o = observation
    norms = [float(d["norm"]) for d in o.defenses if d["name"] == "clip"]
    inside = any(d.get("level") == "example" and d["name"] == "clip" for d in o.defenses)
    length = float(torch.linalg.vector_norm(o.update.double()))
    untouched = not norms or (o.clients == 1 and not inside and length < min(norms) * (1 - 1e-4))
    return untouched and {str(d["name"]) for d in o.defenses} <= KEEP_LENGTH


def noise_std(observation: Observation) -> float:
    """Standard deviation of the Gaussian noise on a coordinate of `observation.gradient`; 0 without any."""
    o, variance = observation, 0.0
    clip = {"client": inf, "example": inf}
    for defense in o.defenses:
        level = str(defense.get("level", "client"))
        if "norm" in defense:
            clip[level] = min(clip[level], float(defense["norm"]))
        elif defense["name"] == "gaussian":
            per_row = 1.0 if defense.get("unbounded") else clip[level]
            std = float(defense["noise_multiplier"]) * per_row
            if isfinite(std):
                variance += (std * _share(o, defense, level)) ** 2
    return sqrt(variance) / o.step_size


def _share(o: Observation, defense: Mapping[str, Any], level: str) -> float:
    """What a row's noise counts in the update: it is averaged over clients or, inside local training, added
    to the mean gradient of each of u steps."""
    if level == "example":
        batch = o.per_client if o.local is None else o.local.batch or o.per_client
        lr = 1.0 if o.local is None else o.local.lr
        return lr * sqrt(o.local_steps / o.clients) / min(batch, o.per_client)
    return 1 / sqrt(o.clients) if defense["placement"] == "client" else 1 / o.clients


def _variation(observation: Observation) -> float:
    """Mean absolute difference of neighbouring pixels, of public images where there are any."""
    low, high = observation.input_range
    public = observation.auxiliary
    if public is None or public.x.dim() != 4:
        return TYPICAL_VARIATION * (high - low)
    x = public.x[:1000]
    nothing = x.new_empty(0)
    return max(float(total_variation(x[:, None], nothing, nothing).mean()) / 2, 1e-6 * (high - low))


def _clip(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    if keeps_length(o):
        return replace(a, words=(*a.words, "the clip did not act"))
    return replace(a, distance=_blind(a.distance), words=(*a.words, "distance blind to scale, for the clip"))


def _scaled(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    words = f"distance blind to scale, for {defense['name']}"
    return replace(a, distance=_blind(a.distance), words=(*a.words, words))


def _by_layer(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    inner = a.distance if isinstance(a.distance, Times | Signs | Parts) else _blind(a.distance)
    words = f"distance blind to the scale of each of {len(o.layout.sizes)} parameter tensors"
    fitted = inner if inner is a.distance else Parts(inner, o.layout.sizes)
    return replace(a, distance=fitted, words=(*a.words, words))


def _blind(distance: Distance) -> Distance:
    """The distance without the scale: its own kind where there is one, the cosine otherwise."""
    if isinstance(distance, Masked):
        return Masked(_blind(distance.inner))
    if isinstance(distance, First):
        return First(_blind(distance.inner), distance.count)
    if isinstance(distance, Times | Signs | Parts):
        return distance
    return SCALE_FREE.get(distance, cosine)


def _gaussian(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    """The negative log-likelihood ‖s g − t‖² / (2 std²) with s free, beside a Laplace prior."""
    std = noise_std(o)
    if std == 0:
        return a
    masked = isinstance(a.distance, Masked) or isinstance(getattr(a.distance, "inner", None), Masked)
    inner = Masked(scaled) if masked else scaled
    tv = o.num_examples * prod(o.input_shape) / _variation(o)
    return replace(
        a,
        distance=Times(inner, 1 / (2 * std * std)),
        tv=tv,
        strength=a.strength * tv / a.tv if a.tv else a.strength,
        words=(*a.words, f"likelihood of Gaussian noise, std {std:.3g} a coordinate"),
    )


def _masked(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    sent = int((o.update != 0).sum())
    words = f"distance over the {sent} of {o.layout.size} coordinates that {defense['name']} sent"
    return replace(a, distance=Masked(a.distance), words=(*a.words, words))


def _before_bottleneck(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    """Scheliga et al. 2022, arXiv:2208.04767: the gradients of what was drawn are left out."""
    offsets = dict(zip(o.layout.names, accumulate(o.layout.sizes, initial=0), strict=False))
    count = next((at for n, at in offsets.items() if n.endswith("encoder.weight")), 0)
    if count == 0:
        return a
    words = (
        f"distance over the {count} of {o.layout.size} coordinates before the bottleneck, drawn at its mean"
    )
    return replace(a, distance=First(a.distance, count), words=(*a.words, words))


def _signs(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    return replace(a, distance=Signs(), words=(*a.words, "agreement of signs, magnitudes unknown"))


RULES: dict[str, Rule] = {
    "clip": _clip,
    "normalise": _scaled,
    "soft-clip": _scaled,
    "adaptive-clip": _scaled,
    "clip-layers": _by_layer,
    "gaussian": _gaussian,
    "topk": _masked,
    "randk": _masked,
    "prune": _masked,
    "soteria": _masked,
    "sign": _signs,
    "precode": _before_bottleneck,
}
