"""Simulators of federated averaging behind one small interface.

A rival is a class with `name` and `version`, built from (model name, clients, batch, lr, epochs):
`rounds(cohorts)` trains one FedAvg round per cohort and returns the seconds, `row()` gives the model's
parameters in PyTorch's order, `close()` ends what was started. All start from the same parameters. The
caller runs one round first that does not count, so that what is set up or compiled lazily is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import numpy as np

Client = tuple[np.ndarray, np.ndarray]
Cohorts = list[list[int]]

CLASSES = {
    "ours": "ours:Ours",
    "plain": "plain:Plain",
    "pfl": "pfl:Pfl",
    "pfl-2": "pfl:PflTwo",
    "fedjax": "fedjax:FedJax",
    "flower": "flower:Flower",
    "lean": "lean:Lean",
    "lean-nn": "lean:LeanNn",
}


class Rival(Protocol):
    name: str
    version: str

    def __init__(
        self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int
    ) -> None: ...

    def rounds(self, cohorts: Cohorts) -> float: ...

    def row(self) -> np.ndarray: ...

    def close(self) -> None: ...


def load(name: str) -> type[Rival]:
    """The class of the rival called `name`; raises ImportError where its package is not installed."""
    module, _, member = CLASSES[name].partition(":")
    found: type[Rival] = getattr(import_module(f"{__name__}.{module}"), member)
    return found
