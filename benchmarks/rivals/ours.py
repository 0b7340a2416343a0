"""A round of fltoolkit as its federations run it: engine, checks and fold, without defenses or onlookers."""

from __future__ import annotations

import time

import numpy as np

import fltoolkit
from fltoolkit.defense import DefenseStack
from fltoolkit.loss import cross_entropy
from fltoolkit.training.round import run_round
from fltoolkit.training.task import Task
from fltoolkit.types import Examples, Layout, LocalSpec
from rivals import Client, Cohorts
from rivals.common import start, tensors


class Ours:
    name = "ours"

    def __init__(self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int) -> None:
        self.clients = [Examples(*tensors(c)) for c in clients]
        local = LocalSpec(epochs, batch, lr)
        self.task = Task(start(model_name), cross_entropy, local, DefenseStack([]), seed=0)
        self.params, self.number = Layout.of(self.task.model).row(self.task.model), 0
        engine = self.task.engine_for(tuple(self.clients[0].x.shape[1:]))
        self.version = f"{fltoolkit.__version__} ({engine.name})"

    def rounds(self, cohorts: Cohorts) -> float:
        begun = time.perf_counter()
        for cohort in cohorts:
            self.number += 1
            done = run_round(self.task, self.params, cohort, self.clients, self.number, witnessed=False)
            self.params = self.params + done.aggregate
        return time.perf_counter() - begun

    def row(self) -> np.ndarray:
        return self.params.numpy().copy()

    def close(self) -> None:
        pass
