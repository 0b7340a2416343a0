"""Fully connected networks: one batched matrix product a layer for all clients, backward by hand.

Clients' weights are views `[K, out, in]` into one matrix of rows `[K, D]`; `baddbmm_` adds the gradient
to them in place, so no gradient is ever stored. On a CPU, each core steps a few clients of its own: two cores
that share one product wait for each other at every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit.loss import cross_entropy
from fltoolkit.training.engines.base import Engine, Stacked, each_on_its_core, in_callers_order, most_first
from fltoolkit.types import Examples, Layout, LocalSpec, Loss

aten = torch.ops.aten

ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    nn.Identity: (lambda h: h, lambda d, h: d),
    nn.ReLU: (torch.relu_, lambda d, h: aten.threshold_backward(d, h, 0)),
    nn.Sigmoid: (torch.sigmoid_, aten.sigmoid_backward),
    nn.Tanh: (torch.tanh_, aten.tanh_backward),
}
"""Layer type -> (in-place activation, gradient from (d, the activation's output))."""

CHUNK_BYTES = 4 << 20
"""Rows of clients that step together on one CPU core: about what stays in cache between two steps."""


@dataclass(frozen=True)
class _Dense:
    """A linear layer of every client, weight `[K, out, in]` and bias `[K, 1, out]` (None: without), their
    velocities alike (None: no momentum), and the activation after it."""

    weight: Tensor
    bias: Tensor | None
    weight_velocity: Tensor | None
    bias_velocity: Tensor | None
    activation: type[nn.Module]

    def forward(self, h: Tensor) -> Tensor:
        w = self.weight[: len(h)].transpose(1, 2)
        out = torch.bmm(h, w) if self.bias is None else torch.baddbmm(self.bias[: len(h)], h, w)
        return ACTIVATIONS[self.activation][0](out)

    def descend(self, h: Tensor, d: Tensor, local: LocalSpec) -> None:
        """One step of SGD on this layer, from its input h `[K, B, in]` and its gradient d `[K, B, out]`."""
        k = len(h)
        _step(
            self.weight[:k],
            None if self.weight_velocity is None else self.weight_velocity[:k],
            local,
            lambda t, beta, alpha: t.baddbmm_(d.transpose(1, 2), h, beta=beta, alpha=alpha),
        )
        if self.bias is not None:
            _step(
                self.bias[:k],
                None if self.bias_velocity is None else self.bias_velocity[:k],
                local,
                lambda t, beta, alpha: t.mul_(beta).add_(d.sum(1, keepdim=True), alpha=alpha),
            )


def _step(
    w: Tensor, velocity: Tensor | None, local: LocalSpec, add: Callable[[Tensor, float, float], Tensor]
) -> None:
    """w ← w − η v, v ← μ v + g + λ w, where `add(t, beta, alpha)` is t ← beta · t + alpha · g."""
    if velocity is None:
        add(w, 1 - local.lr * local.weight_decay, -local.lr)
        return
    if local.weight_decay:
        velocity.mul_(local.momentum).add_(w, alpha=local.weight_decay)
        add(velocity, 1.0, 1.0)
    else:
        add(velocity, local.momentum, 1.0)
    w.sub_(velocity, alpha=local.lr)


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
        rows = params.expand(len(data), -1).clone()

        def train(a: int) -> None:
            ids = order[a : a + at_once]
            self._train(rows[a : a + at_once], [data[k] for k in ids], local, [rngs[k] for k in ids])

        threads = min(torch.get_num_threads(), len(data)) if params.device.type == "cpu" else 1
        at_once = -(-len(data) // threads)
        if params.device.type == "cpu":
            at_once = min(at_once, max(1, CHUNK_BYTES // (params.numel() * params.element_size())))
        each_on_its_core(train, range(0, len(data), at_once), threads)
        return in_callers_order(rows.sub_(params), order)

    def _train(
        self, rows: Tensor, data: Sequence[Examples], local: LocalSpec, rngs: Sequence[np.random.Generator]
    ) -> None:
        """Step the parameters in `rows [k, D]`, in place."""
        stacked = Stacked.of(data, rngs)
        velocity = torch.zeros_like(rows) if local.momentum else None
        layers = _dense_layers(self.model, self.layout, rows, velocity)
        x = stacked.x.flatten(2)
        batches = stacked.epoch(local.batch)
        for _ in range(local.epochs):
            for part, held in batches:
                a = len(held)
                _sgd_step(layers, x[:a, part], stacked.y[:a, part], held, local)


def _sgd_step(layers: Sequence[_Dense], x: Tensor, y: Tensor, held: Tensor, local: LocalSpec) -> None:
    """One step of all clients on their batches x `[K, B, in]`, y `[K, B]`; the first `held[k]` of B count."""
    inputs = [x]
    for layer in layers:
        inputs.append(layer.forward(inputs[-1]))
    d = torch.softmax(inputs.pop(), -1)
    d.scatter_add_(2, y[..., None], d.new_full((*y.shape, 1), -1.0))
    d.mul_(((torch.arange(x.shape[1], device=x.device) < held[:, None]) / held[:, None])[..., None])
    for i in range(len(layers) - 1, -1, -1):
        h = inputs[i]
        below = torch.bmm(d, layers[i].weight[: len(d)]) if i else None
        layers[i].descend(h, d, local)
        if below is not None:
            d = ACTIVATIONS[layers[i - 1].activation][1](below, h)


def _dense_layers(model: nn.Module, layout: Layout, rows: Tensor, velocity: Tensor | None) -> list[_Dense]:
    """The layers of a Sequential over views of `rows`."""
    weights = layout.unflatten(rows)
    velocities = {} if velocity is None else layout.unflatten(velocity)
    steps = [(n, m) for n, m in model.named_children() if type(m) not in (nn.Flatten, nn.Identity)]
    layers = []
    for i, (name, module) in enumerate(steps):
        if isinstance(module, nn.Linear):
            after = type(steps[i + 1][1]) if i + 1 < len(steps) else nn.Identity
            w, b = f"{name}.weight", f"{name}.bias"
            activation = nn.Identity if after is nn.Linear else after
            dense = _Dense(
                weights[w], _rows_of(weights, b), velocities.get(w), _rows_of(velocities, b), activation
            )
            layers.append(dense)
    return layers


def _rows_of(tensors: dict[str, Tensor], bias: str) -> Tensor | None:
    return tensors[bias][:, None] if bias in tensors else None


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
