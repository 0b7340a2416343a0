"""The losses of the library, unreduced: `loss(logits [N, classes], y) -> [N]`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Softmax cross-entropy; y holds class indices `[N]` or distributions `[N, classes]`."""
    return F.cross_entropy(logits, y, reduction="none")
