"""Inputs and pre-activation gradients of all layers from one forward and one backward pass.

The backward pass stops at the layers' outputs, so no gradient by a parameter is ever computed. What it finds
counts only if the autograd graph shows that each parameter was used once, by its own layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fltoolkit.models import evaluating
from fltoolkit.training.private.layers import RULES, rule_for, takes
from fltoolkit.training.private.norms import Term
from fltoolkit.types import Layout, Loss


@dataclass(frozen=True)
class Call:
    """A layer's call: its input, None where that is not one tensor, and how often it had been changed in
    place; where in the graph the output is, None where it has no gradient; the output's length."""

    x: Tensor | None
    version: int
    edge: GradientEdge | None
    length: int


Layers = dict[str, tuple[nn.Module, dict[str, nn.Parameter]]]
"""By name: a layer, and its trainable parameters by their name in the layer."""


def layers_of(model: nn.Module, layout: Layout) -> Layers | None:
    """The layers that own the parameters of `layout`; None if one has no rule."""
    wanted, layers = set(layout.names), {}
    for name, layer in model.named_modules():
        own = {
            k: p
            for k, p in layer._parameters.items()
            if p is not None and f"{name}.{k}".removeprefix(".") in wanted
        }
        if own:
            if rule_for(layer) is None:
                return None
            layers[name] = (layer, own)
    return layers


class Capture:
    """Records the last call of each layer.

    chain: the model is a chain of layers that `keeps_batch_first` knows; their images then go on in
    channels-last memory, in which pooling is many times faster on a CPU.
    """

    def __init__(self, model: nn.Module, layers: Layers, chain: bool) -> None:
        self.model, self.layers, self.chain = model, layers, chain
        self.calls: dict[str, Call] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks on the layers inside; none afterwards."""
        handles = [layer.register_forward_hook(self._hook(name)) for name, (layer, _) in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            x = inputs[0].detach() if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None
            edge = get_gradient_edge(output) if output.requires_grad else None
            self.calls[name] = Call(x, 0 if x is None else x._version, edge, len(output))
            images = self.chain and isinstance(layer, nn.Conv2d) and output.device.type == "cpu"
            return output.contiguous(memory_format=torch.channels_last) if images else None

        return record

    def __call__(self, loss: Loss, x: Tensor, y: Tensor) -> dict[str, Term] | None:
        """Each parameter's term on the examples x `[n, ..]`, y `[n, ..]`, without those that have no part in
        the loss; None where the layers do not tell the gradients."""
        self.calls = {}
        total = loss(self.model(x), y).sum()
        calls = {name: c for name, c in self.calls.items() if c.edge is not None}
        edges = [c.edge for c in calls.values() if c.edge is not None]
        found = torch.autograd.grad(total, edges, allow_unused=True) if edges else ()
        pairs = {n: (c, d) for (n, c), d in zip(calls.items(), found, strict=True) if d is not None}
        if not self._tells(total, pairs, len(x)):
            return None
        return {
            f"{name}.{own}".removeprefix("."): term
            for name, (call, d) in pairs.items()
            for own, term in self._terms(name, call, d).items()
        }

    @torch.no_grad()
    def _terms(self, name: str, call: Call, d: Tensor) -> dict[str, Term]:
        layer, own = self.layers[name]
        assert call.x is not None  # see `_tells`
        return RULES[type(layer)](layer, call.x, d, own)

    def _tells(self, total: Tensor, pairs: Mapping[str, tuple[Call, Tensor]], n: int) -> bool:
        """Whether each layer's call was on a batch and the graph of `total` uses each parameter in that call
        and nowhere else."""
        uses = parameter_uses(total)
        for name, (layer, own) in self.layers.items():
            if any(uses[id(p)] != (name in pairs) for p in own.values()):
                return False
            if name in pairs and not _is_batch(layer, *pairs[name], n):
                return False
        return True

    def batch_comes_first(self, x: Tensor) -> bool:
        """Whether all layers' inputs and outputs have one entry for one example, and no example has a part in
        another's output, tried on x `[1, ..]` alone and beside a different one, in evaluation mode."""
        other = torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).to(x.dtype)
        other = other if x.is_floating_point() else torch.zeros_like(x)
        self.calls = {}
        with torch.no_grad(), evaluating(self.model):
            beside = self.model(torch.cat([x, other]))[:1]
            alone = self.model(x)
        if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-5 * float(1 + alone.abs().max())):
            return False
        return all(c.x is not None and len(c.x) == 1 and c.length == 1 for c in self.calls.values())


def _is_batch(layer: nn.Module, call: Call, d: Tensor, n: int) -> bool:
    """Whether a call's input is n examples, unchanged since, and `d` has as many."""
    x = call.x
    if x is None or not takes(layer, x) or x._version != call.version:
        return False
    return len(x) == len(d) == n


def parameter_uses(total: Tensor) -> Counter[int]:
    """How many edges of the graph of `total` end in each parameter, by its id."""
    uses: Counter[int] = Counter()
    waiting: list[Node] = [total.grad_fn] if total.grad_fn is not None else []
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            variable = getattr(node, "variable", None)
            if variable is not None:
                uses[id(variable)] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return uses
