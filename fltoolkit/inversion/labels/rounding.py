"""From real numbers of examples a class to labels."""

from __future__ import annotations

import torch
from torch import Tensor


def labels_of(counts: Tensor) -> Tensor:
    """Whole counts `[classes]` as labels `[sum of counts]`, increasing."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts.long())


def whole(amounts: Tensor, total: int) -> Tensor:
    """The point of the simplex {k >= 0, Σ k = total} nearest to `amounts [classes]`, rounded to integers by
    largest remainder; ties go to the smaller class."""
    near = nearest_on_simplex(amounts, total)
    counts = near.floor()
    missing = total - int(counts.sum())
    order = (near - counts).argsort(descending=True, stable=True)
    counts[order[:missing]] += 1
    return counts.long()


def nearest_on_simplex(amounts: Tensor, total: float) -> Tensor:
    """Euclidean projection on {k >= 0, Σ k = total}: subtract one number from all, cut at 0."""
    sizes = torch.arange(1, len(amounts) + 1, device=amounts.device, dtype=amounts.dtype)
    down = amounts.sort(descending=True).values
    excess = (down.cumsum(0) - total) / sizes
    kept = int((down > excess).sum())
    return (amounts - excess[max(kept, 1) - 1]).clamp_min(0)


def largest_step(start: Tensor, direction: Tensor) -> float:
    """The largest t for which start + t · direction stays >= 0; both `[classes]`, start >= 0.

    It fixes the scale of an update when nothing else does: the counts are then the most uneven that fit, with
    at least one class absent. That is certain where there are more classes than examples.
    """
    falling = direction < 0
    if not falling.any():
        return 0.0
    return float((start[falling].clamp_min(0) / -direction[falling]).min())
