"""How an attack takes public defenses into account (Kerckhoffs: defenses are no secret, noise draws are).

Each known defense changes the distance between updates: a clip hides the scale, sparsification hides
coordinates, sign compression hides magnitudes, and Gaussian noise of known size says how much a distance
counts against what the adversary believes of images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch

from fltoolkit.inversion.distance import (
    SCALE_FREE,
    Distance,
    First,
    Masked,
    Parts,
    Projected,
    Signs,
    Times,
    cosine,
    scaled,
)
from fltoolkit.inversion.noise_level import STDS, noise_std
from fltoolkit.inversion.prior import total_variation
from fltoolkit.projection import subspace
from fltoolkit.types import Observation

TYPICAL_VARIATION = 0.05
"""Mean absolute difference of neighbouring pixels in natural images at 32x32, in units of the range: the
scale of a Laplace prior on such differences, where no public images say better."""

MIXTURES = {"mixup", "instahide"}

KEEP_LENGTH = {"clip", "secagg", "lightsecagg", "mpc", "precode", *STDS, *MIXTURES}
"""Defenses that do not change the length of an update but by noise, a clip where it does not act."""


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


def mixes(observation: Observation) -> bool:
    """Whether a defense trains on mixtures of examples, whose labels are distributions."""
    return any(d["name"] in MIXTURES for d in observation.defenses)


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


def _within(distance: Distance, change: Callable[[Distance], Distance]) -> Distance:
    """Another distance over the coordinates that are compared already."""
    if isinstance(distance, Masked | First | Projected):
        return replace(distance, inner=_within(distance.inner, change))
    return change(distance)


def _blind(distance: Distance) -> Distance:
    """The distance without the scale: its own kind where there is one, the cosine otherwise."""

    def change(d: Distance) -> Distance:
        return d if isinstance(d, Times | Signs | Parts) else SCALE_FREE.get(d, cosine)

    return _within(distance, change)


def _noisy(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    """The negative log-likelihood ‖s g − t‖² / (2 std²) with s free, beside a Laplace prior."""
    std = noise_std(o)
    if std == 0:
        return a
    seen = a.distance.inner if isinstance(a.distance, Times) else a.distance
    tv = o.num_examples * prod(o.input_shape) / _variation(o)
    return replace(
        a,
        distance=Times(_within(seen, lambda _: scaled), 1 / (2 * std * std)),
        tv=tv,
        strength=a.strength * tv / a.tv if a.tv else a.strength,
        words=(*a.words, f"likelihood of the noise of {defense['name']}, std {std:.3g} a coordinate"),
    )


def _masked(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    sent = int((o.update != 0).sum())
    words = f"distance over the {sent} of {o.layout.size} coordinates that {defense['name']} sent"
    return replace(a, distance=Masked(a.distance), words=(*a.words, words))


def _projected(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    rotated = defense["kind"] == "rotate"
    seen = subspace(o.layout.size, float(defense["fraction"]), rotated, int(defense["seed"]), o.round)
    words = f"distance in the {seen.kept} of {seen.size} dimensions of the public subspace"
    return replace(a, distance=Projected(a.distance, seen), words=(*a.words, words))


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


def _mixtures(a: Adaptation, defense: Mapping[str, Any], o: Observation) -> Adaptation:
    words = f"mixtures searched with the distributions of their labels, for {defense['name']}"
    return replace(a, words=(*a.words, words))


RULES: dict[str, Rule] = {
    "clip": _clip,
    "normalise": _scaled,
    "soft-clip": _scaled,
    "adaptive-clip": _scaled,
    "clip-layers": _by_layer,
    **dict.fromkeys(STDS, _noisy),
    "subspace": _projected,
    "topk": _masked,
    "randk": _masked,
    "prune": _masked,
    "soteria": _masked,
    "suppression": _masked,
    "sign": _signs,
    "precode": _before_bottleneck,
    "mixup": _mixtures,
    "instahide": _mixtures,
}
