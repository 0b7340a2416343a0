"""Label Leakage from Gradients (LLG).

Wainakh et al. 2022, arXiv:2105.09369, Algorithm 1. g `[classes]` is the gradient of the last layer summed
over its features; an example of class i moves g_i by the impact m < 0 and every other entry j by the offset
s_j. A negative g_i proves class i present. Those classes are taken once each and m is subtracted; then the
most negative entry is taken and m subtracted, until N labels are found.

The paper sums the weight gradient over features, which needs features >= 0. Where there is a bias, its
gradient is used instead: the bias is one more feature, always 1, so this holds for any activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fltoolkit.inversion.labels.layer import last_layer, scale_is_known
from fltoolkit.inversion.labels.own import own_data
from fltoolkit.inversion.labels.rounding import labels_of
from fltoolkit.types import Observation


def llg(observation: Observation) -> Tensor:
    """LLG: the impact is estimated from the negative entries of the observed gradient, no offset.

    m = (1 + 1/n) / B · Σ_{g_i < 0} g_i with n classes and batch size B. Scaling g scales m, so the scale of
    the update does not matter.
    """
    g = last_layer(observation).logit_gradient
    m = float(g[g < 0].sum()) * (1 + 1 / len(g)) / observation.num_examples
    return _take(g, g < 0, m, observation.num_examples)


def llg_plus(observation: Observation) -> Tensor:
    """LLG+ and LLG*: impact and offset from batches of one label, of public examples or else random inputs.

    m = (1 + 1/n) / (n B) · Σ_i (g_i of a batch all of class i); s_j is the mean of g_j over such batches of
    the other classes. Where the scale of the update is unknown, g is scaled up until an entry reaches its
    offset, which is where its class is absent. Over several steps, m and s are means along the path.
    """
    g, part = last_layer(observation).logit_gradient, own_data(observation).part
    n, present = len(g), g < 0
    diagonal = part.diagonal()
    m = float(diagonal.mean()) * (1 + 1 / n) / observation.num_examples
    s = (part.sum(1) - diagonal) / (n - 1)
    if not scale_is_known(observation) and (g > 0).any():
        g = g * float((s[g > 0] / g[g > 0]).clamp_min(0).min())
    return _take(g - s, present, m, observation.num_examples)


def _take(g: Tensor, present: Tensor, m: float, number: int) -> Tensor:
    """Present classes once, most negative first, then the most negative entry again and again; each time
    m, which is negative, is subtracted from the entry taken."""
    counts = torch.zeros(len(g), dtype=torch.long, device=g.device)
    order = g.masked_fill(~present, torch.inf).argsort(stable=True)
    counts[order[: min(number, int(present.sum()))]] = 1
    left = g - m * counts
    for _ in range(number - int(counts.sum())):
        lowest = int(left.argmin())
        counts[lowest] += 1
        left[lowest] -= m
    return labels_of(counts)
