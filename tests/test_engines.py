"""Every engine against a plain loop over clients with torch.optim, on the same random order."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fltoolkit import models
from fltoolkit.loss import cross_entropy
from fltoolkit.training.engines import ENGINES, choose
from fltoolkit.types import Examples, Layout, LocalSpec


def plain_loop(model, params, data, local, rngs):
    """ClientUpdate of McMahan et al. 2017, Algorithm 1, client by client, as one reads it."""
    layout, rows = Layout.of(model), []
    for d, rng in zip(data, rngs, strict=True):
        mine = copy.deepcopy(model)
        nn.utils.vector_to_parameters(params.clone(), mine.parameters())
        optimiser = torch.optim.SGD(
            mine.parameters(), local.lr, momentum=local.momentum, weight_decay=local.weight_decay
        )
        batches = torch.from_numpy(rng.permutation(len(d))).split(local.batch or len(d))
        for _ in range(local.epochs):
            for b in batches:
                optimiser.zero_grad()
                nn.functional.cross_entropy(mine(d.x[b]), d.y[b]).backward()
                optimiser.step()
        rows.append(layout.row(mine) - params)
    return torch.stack(rows)


def clients(shape, classes, sizes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        Examples(torch.rand(n, *shape, generator=rng), torch.randint(classes, (n,), generator=rng))
        for n in sizes
    ]


class TwiceUsed(nn.Module):
    """One linear layer called twice, another with its weight tied to a third."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.tied = nn.Linear(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.again.weight
        self.twice, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x.flatten(1)))
        h = torch.tanh(self.tied(torch.tanh(self.again(h))))
        return self.out(torch.tanh(self.twice(torch.tanh(self.twice(h)))))


def builders():
    def named(name, shape):
        return lambda: models.build(name, shape, 4, torch.Generator().manual_seed(1)), shape

    def seeded(make):
        def build():
            torch.manual_seed(2)
            return make()

        return build

    narrow = seeded(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 4)
        )
    )
    grouped = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 4)
        )
    )
    return {
        "2nn": named("2nn", (1, 3, 3)),
        "mlp": named("mlp", (1, 3, 3)),
        "softmax": named("softmax", (1, 3, 3)),
        "narrow": (narrow, (1, 3, 3)),
        "cnn": named("cnn", (1, 8, 8)),
        "lenet": named("lenet", (3, 8, 8)),
        "grouped": (grouped, (2, 4, 4)),
        "twice": (seeded(TwiceUsed), (9,)),
    }


RECIPES = {
    "fedsgd": LocalSpec(1, None, 0.3),
    "short last batch": LocalSpec(2, 4, 0.1),
    "momentum": LocalSpec(2, 5, 0.05, momentum=0.9),
    "decay": LocalSpec(2, 5, 0.1, weight_decay=0.1),
    "both": LocalSpec(1, 3, 0.05, momentum=0.5, weight_decay=0.1),
    "batch above the data": LocalSpec(2, 100, 0.1),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", builders())
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_equals_the_plain_loop(engine, model, recipe):
    build, shape = builders()[model]
    net, local = build(), RECIPES[recipe]
    if ENGINES[engine].refuses(net, cross_entropy, shape):
        pytest.skip(f"{engine} does not train {model}")
    data = clients(shape, 4, (7, 1, 12, 4, 12))
    params = Layout.of(net).row(net)
    before, kept = params.clone(), copy.deepcopy(net)

    def rngs():
        return [np.random.default_rng(k) for k in range(len(data))]

    rows = choose(net, cross_entropy, shape, engine)(params, data, local, rngs())
    expected = plain_loop(net, params, data, local, rngs())
    assert expected.abs().max() > 1e-3
    assert (rows - expected).abs().max() / expected.abs().max() < 1e-4
    assert torch.equal(params, before)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), kept.parameters(), strict=True))


def test_every_engine_trains_something_here():
    able = {
        e: [m for m, (b, s) in builders().items() if not ENGINES[e].refuses(b(), cross_entropy, s)]
        for e in ENGINES
    }
    assert able["batched"] == ["2nn", "mlp", "softmax", "narrow"]
    assert able["looped"] == able["vmapped"] == list(builders())
