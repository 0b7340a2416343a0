"""Flower: FedAvg on its simulation runtime (Ray), two actors with one processor and one thread each.

The server app waits for orders, so start-up is not in the time: it runs from the first `configure_train` to
the end of the last `aggregate_train`. Flower draws the cohort itself, of the size asked for. An actor reads
the clients' data and builds the model once; a client trains by the plain loop of `rivals.plain`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
import ray
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.utils.data import DataLoader

from rivals import Client, Cohorts
from rivals.common import row_of, start
from rivals.plain import loader, train

ACTORS = 2


@cache
def _loaders(path: str, batch: int) -> list[tuple[DataLoader, int]]:
    """Every client's loader and number of examples."""
    torch.set_num_threads(1)
    with np.load(path) as kept:
        clients = [(kept[f"x{k}"], kept[f"y{k}"]) for k in range(len(kept.files) // 2)]
    return [(loader(c, batch), len(c[1])) for c in clients]


@cache
def _model(model_name: str) -> nn.Module:
    return start(model_name)


def _client_app(model_name: str, path: str, batch: int, lr: float, epochs: int) -> ClientApp:
    app = ClientApp()

    @app.train()
    def update(message: Message, context: Context) -> Message:
        data, examples = _loaders(path, batch)[int(context.node_config["partition-id"])]
        model = _model(model_name)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train(model, data, lr, epochs)
        metrics = MetricRecord({"num-examples": examples})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    return app


class _Timed(FedAvg):
    begun = ended = 0.0

    def configure_train(self, *values: Any, **named: Any) -> Any:
        self.begun = self.begun or time.perf_counter()
        return super().configure_train(*values, **named)

    def aggregate_train(self, *values: Any, **named: Any) -> Any:
        result = super().aggregate_train(*values, **named)
        self.ended = time.perf_counter()
        return result


class Flower:
    name = "flower"
    version = f"{version('flwr')} (ray {ray.__version__})"

    def __init__(self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self.model, self.count = start(model_name), len(clients)
        self.arrays = ArrayRecord(self.model.state_dict())
        self.folder = TemporaryDirectory()
        path = Path(self.folder.name) / "clients.npz"
        arrays: dict[str, Any] = {}
        for k, (x, y) in enumerate(clients):
            arrays |= {f"x{k}": x, f"y{k}": y}
        np.savez(path, **arrays)
        # The actors import this package.
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        self.orders: Queue[tuple[int, int] | None] = Queue()
        self.answers: Queue[float | BaseException] = Queue()
        client = _client_app(model_name, str(path), batch, lr, epochs)
        self.thread = threading.Thread(target=self._simulate, args=(client,), daemon=True)
        self.thread.start()

    def _simulate(self, client: ClientApp) -> None:
        server = ServerApp()
        server.main()(self._serve)
        ray_arguments = {"num_cpus": ACTORS, "include_dashboard": False, "log_to_driver": False}
        config = {"init_args": ray_arguments, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        try:
            run_simulation(server, client, self.count, backend_config=config)
        except BaseException as e:
            self.answers.put(e)

    def _serve(self, grid: Grid, context: Context) -> None:
        while order := self.orders.get():
            rounds, cohort = order
            strategy = _Timed(
                fraction_train=0.5 / self.count,
                fraction_evaluate=0.0,
                min_train_nodes=cohort,
                min_available_nodes=self.count,
            )
            self.arrays = strategy.start(grid, self.arrays, num_rounds=rounds).arrays
            self.answers.put(strategy.ended - strategy.begun)

    def rounds(self, cohorts: Cohorts) -> float:
        self.orders.put((len(cohorts), len(cohorts[0])))
        answer = self.answers.get()
        if isinstance(answer, BaseException):
            raise RuntimeError(f"Flower's simulation ended: {answer}") from answer
        return answer

    def row(self) -> np.ndarray:
        self.model.load_state_dict(self.arrays.to_torch_state_dict())
        return row_of(self.model)

    def close(self) -> None:
        self.orders.put(None)
        self.thread.join(20)
        ray.shutdown()
        self.folder.cleanup()
