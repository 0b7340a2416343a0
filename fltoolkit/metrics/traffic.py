"""What a round's messages weigh, as measured on the messages themselves."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor

FLOAT_BITS = 32


@dataclass(frozen=True)
class Traffic:
    """Bytes that a client sends (up) and receives (down) in a round, mean over the clients."""

    up: float
    down: float


def plain_traffic(messages: Tensor) -> Traffic:
    """Of messages `[K, D]` that go as they are, and a model of D float32."""
    up = sum(coded_bytes(row) for row in messages) / max(1, len(messages))
    return Traffic(up, messages.shape[1] * FLOAT_BITS / 8)


def coded_bytes(message: Tensor) -> float:
    """Bytes of `message [D]` in the shortest of four plain lossless codes: every number as float32; those
    that are not zero, and a bit for each place; those that are not zero, each with its place; a table of
    the distinct values, and its index for each place. An upper bound: what both ends can draw from a shared
    seed need not be sent at all."""
    size = message.numel()
    filled = int((message != 0).sum())
    codes = [
        size * FLOAT_BITS,
        size + filled * FLOAT_BITS,
        filled * (FLOAT_BITS + ceil(log2(max(2, size)))),
        _table_bits(message, size),
    ]
    return min(codes) / 8


def _table_bits(message: Tensor, size: int) -> int:
    distinct = len(torch.unique(message))
    return distinct * FLOAT_BITS + size * ceil(log2(max(1, distinct)))
