"""FedJAX (Google): its federated averaging by `for_each_client` with the "jit" backend, on the CPU.

The networks are written in jax.numpy, images and kernels with channels last as XLA's CPU convolutions want
them. The start is PyTorch's, transposed. FedJAX 0.0.17 calls `jax.tree_map`, which JAX 0.4.26 deprecated
and later versions removed; it is put back here.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import jax

if not hasattr(jax, "tree_map"):
    jax.tree_map = jax.tree_util.tree_map

import fedjax
import numpy as np
from fedjax.algorithms import fed_avg
from jax import lax
from jax import numpy as jnp
from torch import nn

from rivals import Client, Cohorts
from rivals.common import start

Params = dict[str, Any]


def two_nn(params: Params, x: Any) -> Any:
    h = x.reshape(len(x), -1)
    h = jax.nn.relu(h @ params["1.weight"] + params["1.bias"])
    h = jax.nn.relu(h @ params["3.weight"] + params["3.bias"])
    return h @ params["5.weight"] + params["5.bias"]


def cnn(params: Params, x: Any) -> Any:
    h = x.reshape(len(x), 28, 28, 1)
    for name in ("0", "3"):
        kernel, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        h = lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = jax.nn.relu(h + bias)
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = h.reshape(len(h), -1)
    h = jax.nn.relu(h @ params["7.weight"] + params["7.bias"])
    return h @ params["9.weight"] + params["9.bias"]


FORWARD = {"2nn": two_nn, "cnn": cnn}


def _to_jax(model_name: str, model: nn.Module) -> Params:
    """Linear [out, in] -> [in, out]; kernels OIHW -> HWIO; the CNN's first linear layer reads H, W, C."""
    params = {}
    for name, p in model.named_parameters():
        a = p.detach().numpy()
        if model_name == "cnn" and name == "7.weight":
            a = a.reshape(512, 64, 7, 7).transpose(2, 3, 1, 0).reshape(-1, 512)
        elif a.ndim == 4:
            a = a.transpose(2, 3, 1, 0)
        elif a.ndim == 2:
            a = a.T
        params[name] = jnp.array(a, copy=True)
    return params


def _to_row(model_name: str, model: nn.Module, params: Params) -> np.ndarray:
    parts = []
    for name, p in model.named_parameters():
        a = np.asarray(params[name])
        if model_name == "cnn" and name == "7.weight":
            a = a.reshape(7, 7, 64, 512).transpose(3, 2, 0, 1)
        elif a.ndim == 4:
            a = a.transpose(3, 2, 0, 1)
        elif a.ndim == 2:
            a = a.T
        parts.append(np.ascontiguousarray(a).reshape(p.numel()))
    return np.concatenate(parts)


class FedJax:
    name = "fedjax"
    version = f"{version('fedjax')} (jax {jax.__version__})"

    def __init__(self, model_name: str, clients: list[Client], batch: int, lr: float, epochs: int) -> None:
        self.model_name, self.model, forward = model_name, start(model_name), FORWARD[model_name]

        def loss(params: Params, examples: Params, rng: Any) -> Any:
            chosen = jax.nn.log_softmax(forward(params, examples["x"]))
            return -jnp.take_along_axis(chosen, examples["y"][:, None], 1).mean()

        hparams = fedjax.ShuffleRepeatBatchHParams(batch_size=batch, num_epochs=epochs, seed=0)
        with fedjax.for_each_client_backend("jit"):
            self.algorithm = fed_avg.federated_averaging(
                jax.grad(loss), fedjax.optimizers.sgd(lr), fedjax.optimizers.sgd(1.0), hparams
            )
        self.state = self.algorithm.init(_to_jax(model_name, self.model))
        self.clients = [fedjax.ClientDataset({"x": x, "y": y.astype(np.int32)}) for x, y in clients]
        self.key = jax.random.PRNGKey(0)

    def rounds(self, cohorts: Cohorts) -> float:
        begun = time.perf_counter()
        for cohort in cohorts:
            self.key, *keys = jax.random.split(self.key, len(cohort) + 1)
            chosen = [(c, self.clients[c], k) for c, k in zip(cohort, keys, strict=True)]
            self.state, _ = self.algorithm.apply(self.state, chosen)
        jax.block_until_ready(self.state.params)
        return time.perf_counter() - begun

    def row(self) -> np.ndarray:
        return _to_row(self.model_name, self.model, self.state.params)

    def close(self) -> None:
        pass
