"""Small problems that many tests share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fltoolkit.defense import DefenseStack, RoundContext
from fltoolkit.loss import cross_entropy
from fltoolkit.types import Examples, Layout, LocalSpec, Observation, PrivacyEvent


@pytest.fixture(autouse=True)
def _steady_threads():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    """What works on several threads at once does so, also where tests run side by side on one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Protected:
    """What defenses make of a round; see `fltoolkit.types.Transcript`."""

    messages: torch.Tensor
    total: torch.Tensor
    aggregate: torch.Tensor
    events: tuple[PrivacyEvent, ...]


def protect(stack: DefenseStack, rows: torch.Tensor, ctx: RoundContext) -> Protected:
    """All steps of a stack in the order in which a round takes them."""
    left = stack.secure_sum(stack.clients(rows, ctx), ctx)
    return Protected(left.messages, left.total, stack.server(left.total, ctx), stack.events(ctx))


def tiny_model(seed: int = 0, classes: int = 4, side: int = 5) -> nn.Module:
    """A smooth 2-layer network on 1 x side x side inputs; side²-12-classes, sigmoid."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(side**2, 12), nn.Sigmoid(), nn.Linear(12, classes))
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.5, 0.5, generator=generator)
    return model


def tiny_examples(count: int, seed: int = 1, classes: int = 4, side: int = 5) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, side, side, generator=generator)
    return Examples(x, torch.randint(0, classes, (count,), generator=generator))


def plain_gradient(model: nn.Module, data: Examples) -> torch.Tensor:
    """The batch gradient as a row, by ordinary autograd."""
    loss = nn.functional.cross_entropy(model(data.x), data.y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def observe(model: nn.Module, data: Examples, **changes) -> Observation:
    """What a server sees of one gradient step of size 1 on `data`."""
    layout = Layout.of(model)
    values = {
        "model": model,
        "loss": cross_entropy,
        "layout": layout,
        "params": layout.row(model),
        "update": -plain_gradient(model, data),
        "clients": 1,
        "num_examples": len(data),
        "input_shape": tuple(data.x.shape[1:]),
        "input_range": (0.0, 1.0),
        "num_classes": 4,
        "local": LocalSpec(),
    }
    return Observation(**(values | changes))
