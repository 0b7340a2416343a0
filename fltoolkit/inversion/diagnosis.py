"""Why a search did not do better, as far as the adversary's own data can tell.

Every finding reads the observation and the search's end, never the truth. An empty list means that the update
was matched and nothing speaks against the result.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, sqrt

from torch import nn

from fltoolkit.inversion.noise_level import noise_std
from fltoolkit.types import Observation

UNMATCHED = 0.01
"""Share of a zero update's distance above which an update counts as not matched."""
SILENT = 0.2
"""Share of a layer's units without gradient from which it is worth a word."""

Finding = Callable[[Observation, float], str]
"""`finding(observation, part) -> words or ""`, part the objective at the end over that of a zero update."""


def diagnose(observation: Observation, loss: float, scale: float) -> tuple[str, ...]:
    """What kept a search that ended at `loss` from doing better; scale: the distance of an update of zero."""
    part = loss / scale if scale > 0 else 0.0
    return tuple(words for words in (f(observation, part) for f in FINDINGS) if words)


def _ended(o: Observation, part: float) -> str:
    if not isfinite(part):
        return "diverged: the objective is not finite from any start; try a smaller step or start"
    if part > UNMATCHED and noise_std(o) == 0:
        return f"the update is not matched: {part:.1%} of a zero update's distance is left; try more restarts"
    return ""


def _noise(o: Observation, part: float) -> str:
    std = noise_std(o)
    if std == 0:
        return ""
    noise, observed = std * sqrt(o.layout.size), float(o.gradient.norm())
    signal = sqrt(max(0.0, observed**2 - noise**2))
    return f"noise of norm {noise:.3g} covers a gradient of norm about {signal:.3g}"


def _batch_norm(o: Observation, part: float) -> str:
    layers = [m for m in o.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if o.buffers is None and any(m.training for m in layers):
        return "BatchNorm uses the statistics of the batch, so shift and scale of the inputs are hidden"
    return ""


def _silent_units(o: Observation, part: float) -> str:
    """Units of the first layer that no example reached: dead or saturated."""
    first = next(iter(o.layout.unflatten(o.update).values()))
    if first.dim() < 2:
        return ""
    norms = first.flatten(1).norm(dim=1)
    share = float((norms <= 1e-6 * norms.max()).float().mean())
    return f"{share:.0%} of the first layer's units are dead or saturated" if share > SILENT else ""


def _rank(o: Observation, part: float) -> str:
    """A linear layer's weight gradient is a sum of N outer products: its rank bounds what it tells apart."""
    linear = [m for m in o.model.modules() if isinstance(m, nn.Linear)]
    width = max((min(m.in_features, m.out_features) for m in linear), default=0)
    if 0 < width < o.num_examples:
        return f"batch of {o.num_examples} is larger than the rank {width} of the widest linear layer"
    return ""


def _steps(o: Observation, part: float) -> str:
    if o.local is None:
        return "local training is unknown"
    return ""


def _unsent(o: Observation, part: float) -> str:
    share = float((o.update == 0).float().mean())
    return f"{share:.0%} of the update's coordinates are zero" if share > 0.5 else ""


FINDINGS: tuple[Finding, ...] = (_ended, _noise, _batch_norm, _silent_units, _rank, _steps, _unsent)
