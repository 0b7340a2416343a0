"""The clipped sum of DP-SGD through Opacus (Yousefpour et al. 2021, arXiv:2109.12298), the reference.

Its hooks keep every example's gradient in memory; ours, in `clipped`, does not. A test holds them equal.
"""

from __future__ import annotations

import warnings
from copy import deepcopy

import torch
from torch import Tensor, nn

from fltoolkit.types import Layout, Loss


def opacus_clipped_sum(
    model: nn.Module, loss: Loss, layout: Layout, x: Tensor, y: Tensor, norm: float
) -> tuple[Tensor, Tensor]:
    """Σ_i min(1, norm / ‖g_i‖₂) g_i as a row `[D]`, and the norms `[B]`; arguments as
    `fltoolkit.training.private.clipped.clipped_sum`."""
    if len(x) == 0:
        return x.new_zeros(layout.size, dtype=torch.float32), x.new_zeros(0, dtype=torch.float32)
    from opacus import GradSampleModule

    wrapped = GradSampleModule(deepcopy(model), loss_reduction="sum")
    wrapped.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        loss(wrapped(x), y).sum().backward()
    named = {n.removeprefix("_module."): p for n, p in wrapped.named_parameters()}
    rows = layout.flatten({n: named[n].grad_sample for n in layout.names})
    norms = torch.linalg.vector_norm(rows.double(), dim=1).to(rows.dtype)
    return (norm / norms.clamp_min(norm)) @ rows, norms
