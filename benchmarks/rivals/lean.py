"""A character LSTM in a tight loop on two threads: indexed batches, the update in place; no DataLoader.

"lean" trains the toolkit's peephole LSTM by autograd. "lean-nn" trains `nn.LSTM` in its place, PyTorch's own
fused kernels: the same sizes, but no peepholes and two biases a gate, so a little less and another model.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit.loss import cross_entropy
from rivals import Client, Cohorts
from rivals.common import TASKS, put_row, row_of, start, tensors


class CharLstm(nn.Module):
    """Embedding of 8, two `nn.LSTM` layers of 256 units, and the next character after each."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.out = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(x))[0])


class Lean:
    name = "lean"
    version = torch.__version__

    def __init__(self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int) -> None:
        if model_name != "lstm":
            raise ValueError(f"{self.name} must get the model 'lstm', got {model_name!r}")
        torch.manual_seed(0)
        self.model = self.build()
        self.clients, self.batch, self.lr, self.epochs = [tensors(c) for c in clients], batch, lr, epochs

    def build(self) -> nn.Module:
        return start("lstm")

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
                    loss = cross_entropy(self.model(x[index]), y[index]).mean()
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


class LeanNn(Lean):
    name = "lean-nn"

    def build(self) -> nn.Module:
        """Starts as the peephole model does, with the peepholes at zero."""
        model, source = CharLstm(TASKS["lstm"][2]), start("lstm")
        with torch.no_grad():
            model.embedding.weight.copy_(source.embedding.weight)
            model.out.weight.copy_(source.out.weight)
            model.out.bias.copy_(source.out.bias)
            for k, layer in enumerate(source.layers):
                for name, value in (
                    (f"weight_ih_l{k}", layer.input_weight),
                    (f"weight_hh_l{k}", layer.hidden_weight),
                    (f"bias_ih_l{k}", layer.bias),
                ):
                    getattr(model.lstm, name).copy_(_rolled(value, -1))
                getattr(model.lstm, f"bias_hh_l{k}").zero_()
        return model

    @torch.no_grad()
    def row(self) -> np.ndarray:
        model, lstm = start("lstm"), self.model.lstm
        put_row(model, np.zeros_like(row_of(model)))
        model.embedding.weight.copy_(self.model.embedding.weight)
        model.out.weight.copy_(self.model.out.weight)
        model.out.bias.copy_(self.model.out.bias)
        for k, layer in enumerate(model.layers):
            layer.input_weight.copy_(_rolled(getattr(lstm, f"weight_ih_l{k}"), 1))
            layer.hidden_weight.copy_(_rolled(getattr(lstm, f"weight_hh_l{k}"), 1))
            both = getattr(lstm, f"bias_ih_l{k}") + getattr(lstm, f"bias_hh_l{k}")
            layer.bias.copy_(_rolled(both, 1))
        return row_of(model)


def _rolled(weights: Tensor, by: int) -> Tensor:
    """Gates in the order o, i, f, g turned to i, f, g, o (by -1) and back (by 1)."""
    return weights.unflatten(0, (4, -1)).roll(by, 0).flatten(0, 1)
