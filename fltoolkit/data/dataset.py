"""A data set in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fltoolkit.types import Examples


@dataclass(frozen=True)
class Dataset:
    """train and test (None where there is none): x float32 `[N, C, H, W]` within input_range, y int64 `[N]`
    in 0..num_classes - 1.

    clients `[N_train]`: the natural client 0..K-1 of each training example, None where there is none.
    note: what must be said beside a figure that rests on this data.
    """

    name: str
    train: Examples
    test: Examples | None
    num_classes: int
    input_range: tuple[float, float] = (0.0, 1.0)
    clients: Tensor | None = None
    note: str = ""

    @property
    def client_ids(self) -> np.ndarray | None:
        return None if self.clients is None else self.clients.numpy()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.x.shape[1:])
