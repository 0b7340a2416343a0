"""Fully connected networks: one batched matrix product a layer for all clients.

Clients' weights are views `[K, out, in]` into one matrix of rows `[K, D]`; `baddbmm_` adds the gradient
to them in place, so no gradient is ever stored. On a CPU, each core steps a few clients of its own: two cores
that share one product wait for each other at every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit.loss import cross_entropy
from fltoolkit.training.engines import dense
from fltoolkit.training.engines.base import Engine, Stacked, each_on_its_core, in_callers_order, most_first
from fltoolkit.types import Examples, Layout, LocalSpec, Loss

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "linear",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
"""Layer type -> its name in `dense.train`."""

LINE = 16
"""Floats in a cache line of 64 bytes."""

CHUNK_BYTES = 4 << 20
"""Rows of clients that step together on one CPU core: about what stays in cache between two steps."""


class Batched(Engine):
    """Sequential networks of linear layers and elementwise activations under cross-entropy."""

    name = "batched"
    about = "linear layers with activations: batched matrix products over clients"

    @classmethod
    def refuses(cls, model: nn.Module, loss: Loss, input_shape: tuple[int, ...]) -> str | None:
        if loss is not cross_entropy:
            return "its loss is not the toolkit's cross_entropy"
        if type(model) is not nn.Sequential:
            return "it is not a torch.nn.Sequential"
        layers = list(model)
        for layer in layers:
            if type(layer) not in (nn.Linear, nn.Flatten, *ACTIVATIONS):
                return f"layer {type(layer).__name__} is none of Flatten, Linear, ReLU, Sigmoid, Tanh"
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        if len({id(p) for p in model.parameters()}) != sum(len(list(m.parameters())) for m in linear):
            return "its layers share parameters"
        if not all(p.requires_grad for p in model.parameters()):
            return "some of its parameters are frozen"
        return _misplaced(layers, input_shape)

    def __call__(
        self,
        params: Tensor,
        data: Sequence[Examples],
        local: LocalSpec,
        rngs: Sequence[np.random.Generator],
    ) -> Tensor:
        order = most_first(data)
        rows = _aligned(len(data), params)

        def train(a: int) -> None:
            ids = order[a : a + at_once]
            self._train(rows[a : a + at_once], [data[k] for k in ids], local, [rngs[k] for k in ids])

        threads = min(torch.get_num_threads(), len(data)) if params.device.type == "cpu" else 1
        at_once = -(-len(data) // threads)
        if params.device.type == "cpu":
            at_once = min(at_once, max(1, CHUNK_BYTES // (params.numel() * params.element_size())))
        each_on_its_core(train, range(0, len(data), at_once), threads)
        return in_callers_order(rows - params, order)

    def _train(
        self, rows: Tensor, data: Sequence[Examples], local: LocalSpec, rngs: Sequence[np.random.Generator]
    ) -> None:
        """Step the parameters in `rows [k, D]`, in place."""
        stacked = Stacked.of(data, local, rngs)
        batches = stacked.epoch(local.batch)
        names, kinds = linear_layers(self.model)
        weights, biases = _views(self.layout, rows, names)
        moving = torch.zeros_like(rows) if local.momentum else rows[:, :0]
        dense.train(
            stacked.x.flatten(2),
            stacked.y,
            [part.start for part, _ in batches],
            batches[0][0].stop,
            [_scale(held, stacked.x[:, part].shape[1]) for part, held in batches],
            weights,
            biases,
            *(_views(self.layout, moving, names) if local.momentum else ([moving] * len(names),) * 2),
            kinds,
            local.epochs,
            local.lr,
            local.momentum,
            local.weight_decay,
        )


def _aligned(count: int, params: Tensor) -> Tensor:
    """`count` copies of `params [D]` as rows `[count, D]`, each of which begins at a cache line."""
    padded = -(-params.numel() // LINE) * LINE
    return params.new_empty(count, padded)[:, : params.numel()].copy_(params)


def _scale(held: Tensor, width: int) -> Tensor:
    """1 / held[k] for the first held[k] of a client's `width` places, else 0: `[K, width, 1]`."""
    places = torch.arange(width, device=held.device)
    return ((places < held[:, None]) / held[:, None])[..., None]


def linear_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linear layers of a Sequential, and of the activation after each."""
    steps = [(n, type(m)) for n, m in model.named_children() if type(m) not in (nn.Flatten, nn.Identity)]
    after = [kind for _, kind in steps[1:]] + [nn.Identity]
    pairs = [
        (n, ACTIVATIONS.get(a, "linear")) for (n, k), a in zip(steps, after, strict=True) if k is nn.Linear
    ]
    return [n for n, _ in pairs], [a for _, a in pairs]


def _views(layout: Layout, rows: Tensor, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights `[K, out, in]` and biases `[K, 1, out]`, `[K, 0]` for none, as views of `rows [K, D]`."""
    parts = layout.unflatten(rows)
    biases = [parts[f"{n}.bias"][:, None] if f"{n}.bias" in parts else rows[:, :0] for n in names]
    return [parts[f"{n}.weight"] for n in names], biases


def _misplaced(layers: Sequence[nn.Module], input_shape: tuple[int, ...]) -> str | None:
    """Why the layers are not [Flatten], then linear layers, each but the last with at most one activation."""
    rest = [m for m in layers if type(m) is not nn.Identity]
    if rest and isinstance(rest[0], nn.Flatten):
        if (rest[0].start_dim, rest[0].end_dim) != (1, -1):
            return "its Flatten keeps some dimensions"
        rest = rest[1:]
    elif len(input_shape) != 1:
        return "it does not flatten its inputs first"
    kinds = [type(m) for m in rest]
    if not kinds or kinds[0] is not nn.Linear or kinds[-1] is not nn.Linear:
        return "it does not begin and end with a linear layer"
    pairs = pairwise(kinds)
    if nn.Flatten in kinds or any(a is not nn.Linear and b is not nn.Linear for a, b in pairs):
        return "its linear layers are not each followed by at most one activation"
    return None
