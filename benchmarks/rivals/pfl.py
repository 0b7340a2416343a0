"""pfl-research (Apple): FederatedAveraging on its SimulatedBackend, in one process or in two workers.

Evaluation is off: pfl evaluates in iteration 0 always, so the iterations are counted from 1. pfl keeps the
order of a user's examples (no shuffling); its batches are slices of tensors. Two workers are two processes
with one thread each that share a cohort and sum by torch.distributed, by pfl's PFL_WORKER_* variables.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from socket import socket

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from rivals import Client, Cohorts
from rivals.common import row_of, start, tensors
from rivals.isolated import Isolated

NEVER = 2**31


class _Scored(nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.inner(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        raise RuntimeError("evaluation must be off")


class Pfl:
    name = "pfl"
    version = version("pfl")

    def __init__(self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int) -> None:
        self.module = _Scored(start(model_name))
        central = torch.optim.SGD(self.module.parameters(), lr=1.0)
        self.model = PyTorchModel(self.module, torch.optim.SGD, central)
        self.train = NNTrainHyperParams(
            local_batch_size=batch, local_num_epochs=epochs, local_learning_rate=lr
        )
        users = [PyTorchTensorDataset(tensors(c), user_id=str(k)) for k, c in enumerate(clients)]
        self.queue: list[int] = []
        data = FederatedDataset(users.__getitem__, lambda: self.queue.pop(0))
        self.backend = SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])
        self.algorithm = FederatedAveraging()
        self.algorithm._current_central_iteration = self.iteration = 1

    def rounds(self, cohorts: Cohorts) -> float:
        self.queue.extend(c for cohort in cohorts for c in cohort)
        self.iteration += len(cohorts)
        params = NNAlgorithmParams(
            central_num_iterations=self.iteration,
            evaluation_frequency=NEVER,
            train_cohort_size=len(cohorts[0]),
            val_cohort_size=None,
        )
        begun = time.perf_counter()
        self.algorithm.run(params, self.backend, self.model, self.train, send_metrics_to_platform=False)
        return time.perf_counter() - begun

    def row(self) -> np.ndarray:
        return row_of(self.module)

    def close(self) -> None:
        pass


def _free_ports(count: int) -> list[int]:
    sockets = [socket() for _ in range(count)]
    for s in sockets:
        s.bind(("localhost", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class PflTwo:
    """The slower worker's time counts; both wait for each other at the end of a round."""

    name = "pfl-2"
    version = version("pfl")

    def __init__(self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int) -> None:
        arguments = (model_name, clients, batch, lr, epochs)
        addresses = ",".join(f"localhost:{p}" for p in _free_ports(2))
        self.workers = [
            Isolated("pfl", arguments, 1, {"PFL_WORKER_RANK": str(r), "PFL_WORKER_ADDRESSES": addresses})
            for r in range(2)
        ]
        for w in self.workers:
            w.ready()

    def rounds(self, cohorts: Cohorts) -> float:
        for w in self.workers:
            w.send("rounds", cohorts)
        return max(float(w.wait()) for w in self.workers)

    def row(self) -> np.ndarray:
        return self.workers[0].row()

    def close(self) -> None:
        for w in self.workers:
            w.close()
