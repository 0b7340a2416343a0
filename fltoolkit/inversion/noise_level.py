"""How much noise the defenses put on an observed update, as far as their public parameters tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite, sqrt
from typing import Any

import torch

from fltoolkit import registry
from fltoolkit.types import Observation

Defense = Mapping[str, Any]


def noise_std(observation: Observation) -> float:
    """Standard deviation of the noise on a coordinate of `observation.gradient`; 0 without any. Noise of the
    server counts where the update went through it.

    Noise of a stochastic quantisation, which differs from coordinate to coordinate, counts with its mean
    square.
    """
    o, variance = observation, 0.0
    clip = {"client": inf, "example": inf}
    for defense in o.defenses:
        level = str(defense.get("level", "client"))
        if "norm" in defense:
            clip[level] = min(clip[level], float(defense["norm"]))
        elif defense["name"] in STDS and (o.released or not _at_server(defense)):
            std = STDS[str(defense["name"])](o, defense, 1.0 if defense.get("unbounded") else clip[level])
            if isfinite(std):
                variance += std * std
    return sqrt(variance) / o.step_size


def _at_server(defense: Defense) -> bool:
    """Whether the server adds the noise, which is not on a message then."""
    central = defense.get("placement") == "server" and defense.get("level", "client") == "client"
    return central or defense["name"] == "correlated"


def _gaussian(o: Observation, defense: Defense, clip: float) -> float:
    """A row's noise is averaged over clients or, inside local training, added to the mean gradient of each of
    u steps."""
    std = float(defense["noise_multiplier"]) * clip
    if defense.get("level") == "example":
        batch = o.per_client if o.local is None else o.local.batch or o.per_client
        lr = 1.0 if o.local is None else o.local.lr
        return std * lr * sqrt(o.local_steps / o.clients) / min(batch, o.per_client)
    return std / sqrt(o.clients) if defense["placement"] == "client" else std / o.clients


def _shared(o: Observation, defense: Defense, clip: float) -> float:
    """Each of K clients adds 1/√K of the noise of the sum; their rounding to integers is far below it."""
    cohort = defense.get("clients") or o.clients
    return float(defense["noise_multiplier"]) * clip / sqrt(cohort * o.clients)


def _correlated(o: Observation, defense: Defense, clip: float) -> float:
    mechanism: Any = registry.make_defense(registry.spec_of(defense))
    return float(mechanism.noise_std(o.round)) * clip / o.clients


def _quantised(o: Observation, defense: Defense, clip: float) -> float:
    """E‖Q(v)‖² = ‖v‖² + E‖Q(v) − v‖², and ‖v‖ can be read off one client's entries, whole multiples of
    ‖v‖/s. Of a mean only the bound min(n/s², √n/s) ‖v‖² on the last term is known, n a bucket's size."""
    row, s = o.update.double(), int(defense["levels"])
    n = min(defense.get("bucket") or len(row), len(row))
    if o.clients > 1:
        most = min(n / s**2, sqrt(n) / s)
        return float(row.square().mean()) ** 0.5 * sqrt(most / (1 + most))
    parts = torch.nn.functional.pad(row, (0, -len(row) % n)).view(-1, n)
    size = parts.abs()
    step = torch.where(size > 0, size, torch.inf).min(1).values.nan_to_num(posinf=0.0)
    noise = (parts.square().sum(1) - (s * step).square()).clamp_min(0).sum()
    return sqrt(float(noise) / len(row))


STDS: dict[str, Callable[[Observation, Defense, float], float]] = {
    "gaussian": _gaussian,
    "discrete-gaussian": _shared,
    "skellam": _shared,
    "correlated": _correlated,
    "quantise": _quantised,
}
"""The standard deviation on a coordinate of the update, given the clip norm of what is noised."""
