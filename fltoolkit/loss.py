"""The losses of the library, unreduced: `loss(logits [N, classes], y) -> [N]`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""Where there is nothing to predict in a sequence of labels."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Softmax cross-entropy. y holds class indices `[N]` or distributions `[N, classes]`.

    For logits `[N, T, V]` of sequences, y holds token indices `[N, T]` or IGNORE, and an example's loss is
    the mean over its tokens (0 where it has none). A model may ask for a penalty `[N]` beside its examples'
    losses, by an attribute `penalty` of its logits.
    """
    if logits.dim() == 3:
        flat = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none", ignore_index=IGNORE)
        return flat.view(y.shape).sum(1) / (y != IGNORE).sum(1).clamp_min(1)
    loss = F.cross_entropy(logits, y, reduction="none")
    penalty: Tensor | None = getattr(logits, "penalty", None)
    return loss if penalty is None else loss + penalty
