"""What is refused in one sentence before any work starts, wherever it comes from."""

from __future__ import annotations

import numpy as np
import torch

from fltoolkit.data import Dataset
from fltoolkit.errors import InputError, require
from fltoolkit.types import PRECISIONS, LocalSpec, Loss


def check_local(local: LocalSpec) -> None:
    require(local.epochs >= 1, "epochs", ">= 1", local.epochs)
    require(local.batch is None or local.batch >= 1, "local batch", ">= 1 or inf", local.batch)
    require(np.isfinite(local.lr) and local.lr > 0, "lr", "a finite number > 0", local.lr)
    require(0 <= local.momentum < 1, "momentum", "at least 0 and below 1", local.momentum)
    good = np.isfinite(local.weight_decay) and local.weight_decay >= 0
    require(good, "weight_decay", "a finite number >= 0", local.weight_decay)
    check_precision(local.precision)
    require(local.buffer is None or local.buffer >= 1, "shuffle_buffer", ">= 1", local.buffer)


def check_precision(precision: str) -> None:
    require(precision in PRECISIONS, "precision", f"one of {PRECISIONS}", precision)


SMALLEST_SIDE = 3
"""Of an image that structural similarity can be computed of."""


def check_searchable(data: Dataset) -> None:
    if data.tokens:
        raise InputError(f"data must hold real numbers, such as pixels, to be attacked, got {data.name!r}")
    shape = data.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < SMALLEST_SIDE:
        raise InputError(
            f"data must hold images [C, H, W] with C = 1 or 3 and sides of {SMALLEST_SIDE} or more, by which "
            f"attacks are scored, to be attacked, got {shape} in {data.name!r}"
        )


def check_loss(loss: Loss, num_classes: int) -> None:
    """Refuse a loss that is already averaged: the round weighs examples itself."""
    shape = tuple(loss(torch.zeros(2, num_classes), torch.zeros(2, dtype=torch.long)).shape)
    if shape != (2,):
        raise InputError(
            f"loss must give one value an example, shape (2,), got {shape}: use reduction='none'"
        )


def check_device(device: str) -> torch.device:
    """The device, tried once so that one that is not there stops before work starts. On a GPU convolutions
    are then as precise as matrix products: in full float32 unless PyTorch was told otherwise, where its own
    choice for them would be TF32, 10 bits of mantissa."""
    try:
        found = torch.zeros((), device=device).device
        if found.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
        return found
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device must be one that PyTorch can use here, got {device!r}: {e}") from e
