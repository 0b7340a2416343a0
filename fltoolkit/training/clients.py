"""The clients of a federation, cut from one data set only when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch

from fltoolkit.types import Examples


class Dealt(Sequence[Examples]):
    """Client k holds the examples at `parts[k]`. Idle clients cost their indices and nothing else."""

    def __init__(self, examples: Examples, parts: Sequence[np.ndarray]) -> None:
        self.examples, self.parts = examples, parts

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def sizes(self) -> list[int]:
        """n_k of every client."""
        return [len(part) for part in self.parts]

    @overload
    def __getitem__(self, k: int) -> Examples: ...

    @overload
    def __getitem__(self, k: slice) -> Sequence[Examples]: ...

    def __getitem__(self, k: int | slice) -> Examples | Sequence[Examples]:
        if isinstance(k, slice):
            return Dealt(self.examples, self.parts[k])
        index = torch.from_numpy(np.asarray(self.parts[k], np.int64)).to(self.examples.x.device)
        return Examples(self.examples.x[index], self.examples.y[index])
