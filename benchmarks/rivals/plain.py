"""FedAvg as one writes it in PyTorch: a copy of the model, a DataLoader and torch.optim.SGD a client."""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fltoolkit.loss import cross_entropy
from rivals import Client, Cohorts
from rivals.common import row_of, start, tensors


def loader(client: Client, batch: int) -> DataLoader:
    return DataLoader(TensorDataset(*tensors(client)), batch_size=batch, shuffle=True)


def train(model: nn.Module, data: DataLoader, lr: float, epochs: int) -> None:
    """`epochs` passes of SGD over `data`, in place."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(epochs):
        for x, y in data:
            optimiser.zero_grad()
            cross_entropy(model(x), y).mean().backward()
            optimiser.step()


class Plain:
    name = "plain"
    version = torch.__version__

    def __init__(self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int) -> None:
        torch.manual_seed(0)
        self.model, self.lr, self.epochs = start(model_name), lr, epochs
        self.loaders = [loader(c, batch) for c in clients]
        self.sizes = [len(y) for _, y in clients]

    def rounds(self, cohorts: Cohorts) -> float:
        begun = time.perf_counter()
        for cohort in cohorts:
            self._round(cohort)
        return time.perf_counter() - begun

    def _round(self, cohort: list[int]) -> None:
        total = sum(self.sizes[c] for c in cohort)
        mean: dict[str, Tensor] = {}
        for c in cohort:
            model = copy.deepcopy(self.model)
            train(model, self.loaders[c], self.lr, self.epochs)
            for name, value in model.state_dict().items():
                part = value * (self.sizes[c] / total)
                mean[name] = mean[name] + part if name in mean else part
        self.model.load_state_dict(mean)

    def row(self) -> np.ndarray:
        return row_of(self.model)

    def close(self) -> None:
        pass
