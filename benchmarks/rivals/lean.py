"""The character LSTM in a tight loop: nn.LSTM, indexed batches, the update in place; no DataLoader."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from rivals import Client, Cohorts
from rivals.common import TASKS, put_row, row_of, start, tensors


class CharLstm(nn.Module):
    """Embedding of 8, two LSTM layers of 256 units, and the next character from the last output."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.out = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(x))[0][:, -1])


class Lean:
    name = "lean"
    version = torch.__version__

    def __init__(self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int) -> None:
        if model_name != "lstm":
            raise ValueError(f"lean must get the model 'lstm', got {model_name!r}")
        torch.manual_seed(0)
        self.model, reference = CharLstm(TASKS["lstm"][2]), start("lstm")
        shapes = [[p.shape for p in m.parameters()] for m in (self.model, reference)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"charlstm must have parameters of shapes {shapes[0]}, got {shapes[1]}")
        put_row(self.model, row_of(reference))
        self.clients, self.batch, self.lr, self.epochs = [tensors(c) for c in clients], batch, lr, epochs

    def rounds(self, cohorts: Cohorts) -> float:
        begun = time.perf_counter()
        for cohort in cohorts:
            self._round(cohort)
        return time.perf_counter() - begun

    def _round(self, cohort: list[int]) -> None:
        weights: list[Tensor] = list(self.model.parameters())
        broadcast = [w.detach().clone() for w in weights]
        mean = [torch.zeros_like(w) for w in broadcast]
        total = sum(len(self.clients[c][1]) for c in cohort)
        for c in cohort:
            self._set(weights, broadcast)
            x, y = self.clients[c]
            for _ in range(self.epochs):
                for index in torch.randperm(len(y)).split(self.batch):
                    loss = nn.functional.cross_entropy(self.model(x[index]), y[index])
                    gradients = torch.autograd.grad(loss, weights)
                    with torch.no_grad():
                        torch._foreach_add_(weights, gradients, alpha=-self.lr)
            with torch.no_grad():
                torch._foreach_add_(mean, weights, alpha=len(y) / total)
        self._set(weights, mean)

    @torch.no_grad()
    def _set(self, weights: list[Tensor], values: list[Tensor]) -> None:
        for w, v in zip(weights, values, strict=True):
            w.copy_(v)

    def row(self) -> np.ndarray:
        return row_of(self.model)

    def close(self) -> None:
        pass
