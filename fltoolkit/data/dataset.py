"""A data set in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fltoolkit.types import Examples


@dataclass(frozen=True)
class Dataset:
    """train and test (None where there is none): x float32 `[N, C, H, W]` within input_range, y int64 `[N]`
    in 0..num_classes - 1. Of text, x and y are token ids `[N, T]` int64, y the next token or IGNORE.

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
    def tokens(self) -> bool:
        """Whether inputs are token ids, which nobody can search by gradient descent."""
        return not self.train.x.is_floating_point()

    @property
    def labels_each_token(self) -> bool:
        return self.train.y.dim() == 2

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.x.shape[1:])


def centred(data: Dataset) -> Dataset:
    """Images in [0, 1] moved to [-0.5, 0.5], as TensorFlow's MNIST example of 2015 has them. McMahan et al.
    2017 do not say how they scale pixels; this is the scaling with which their numbers come out."""
    train, test = (s and Examples(s.x - 0.5, s.y) for s in (data.train, data.test))
    assert train is not None
    return replace(data, name=f"{data.name}-centred", train=train, test=test, input_range=(-0.5, 0.5))
