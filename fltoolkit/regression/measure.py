"""What is measured of a case: how much an attack recovers, and what the adversary's view is like.

An attack's PSNR alone misses regressions: an attack that ignores the scale does not notice a clip of twice
the norm, nor does any notice masks that are used twice. So each victim's round is played twice, with the
same data and model and other noise, and the views are compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fltoolkit.audit import Look, Stage, attacked
from fltoolkit.regression.baseline import Case


@dataclass(frozen=True)
class Metric:
    """more: +1 where larger values leak more, -1 where smaller ones do. tolerance: the difference of means
    that is of no account, absolute, or relative to the baseline where `relative`."""

    name: str
    unit: str
    more: int
    tolerance: float
    relative: bool
    about: str

    def negligible(self, old: float, new: float) -> bool:
        return abs(new - old) <= self.tolerance * (abs(old) if self.relative else 1.0)


METRICS = {
    m.name: m
    for m in (
        Metric("psnr_db", "dB", +1, 1.0, False, "mean PSNR of a victim's images"),
        Metric("sent_norm", "", +1, 0.02, True, "L2 norm of the update that the adversary sees"),
        Metric("noise_std", "", -1, 0.02, True, "standard deviation of a coordinate between two runs"),
        Metric("reused", "", +1, 0.01, False, "masked words that are the same in two runs"),
    )
}


def measure(case: Case, seed: int, **objects: Any) -> dict[str, list[float]]:
    """Values by metric, one a victim. objects: see `Case.scene`. Raises InputError where the case is
    impossible."""
    stage = Stage(case.scene(seed, **objects))
    pairs = [(stage.look(v), stage.look(v, again=1)) for v in range(case.victims)]
    found = attacked(stage, [first for first, _ in pairs])
    values = {"psnr_db": [float(v.psnr.mean()) for v in found.victims]}
    values["sent_norm"] = [_of(a, lambda u: float(torch.linalg.vector_norm(u.double()))) for a, _ in pairs]
    values["noise_std"] = [_noise(a, b) for a, b in pairs]
    if stage.stack.hides_messages:
        values["reused"] = [_reused(a, b) for a, b in pairs]
    return values


def _of(look: Look, value: Callable[[Tensor], float]) -> float:
    """A value of the view; 0 where the round was stopped and there is none."""
    return 0.0 if look.observation is None else value(look.observation.update)


def _noise(a: Look, b: Look) -> float:
    """Of two views of the same data their difference holds twice the noise's variance."""
    if a.observation is None or b.observation is None:
        return 0.0
    apart = (a.observation.update - b.observation.update).double()
    return float(apart.square().mean().sqrt() / 2**0.5)


def _reused(a: Look, b: Look) -> float:
    if a.messages is None or b.messages is None or a.messages.shape != b.messages.shape:
        return 0.0
    return float((a.messages == b.messages).double().mean())
