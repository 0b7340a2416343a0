"""How many labels an attack recovered."""

from __future__ import annotations

import torch
from torch import Tensor


def label_accuracy(guess: Tensor, truth: Tensor, num_classes: int) -> float:
    """The part of the true labels `[N]` that the guessed ones `[N]` cover, as multisets, in [0, 1]."""
    counts = [torch.bincount(y.cpu(), minlength=num_classes) for y in (guess, truth)]
    return float(torch.minimum(*counts).sum()) / max(1, len(truth))
