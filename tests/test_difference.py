"""Slopes by a difference of input gradients against those by double backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import observe, tiny_examples
from torch import nn
from torch.nn import functional as F

from attacks.dlg import DLG
from attacks.inverting import Inverting
from fltoolkit import models
from fltoolkit.inversion import difference, matching
from fltoolkit.inversion.client import eager_step
from fltoolkit.inversion.difference import Branches, Difference
from fltoolkit.inversion.distance import cosine, relative
from fltoolkit.inversion.matching import GradientMatching, Objective, one_by_one_is_faster
from fltoolkit.inversion.prior import total_variation
from fltoolkit.inversion.surrogate import SurrogateMatching
from fltoolkit.loss import cross_entropy
from fltoolkit.types import Examples, LocalSpec

SIDE, CLASSES = 12, 4


def by_name(name):
    return lambda: models.build(name, (1, SIDE, SIDE), CLASSES, torch.Generator().manual_seed(3))


def chain(layers):
    def build():
        torch.manual_seed(5)
        return nn.Sequential(*layers(), nn.Flatten(), nn.LazyLinear(CLASSES))

    return build


NETS = {
    "cnn": by_name("cnn"),
    "convnet16": by_name("convnet16"),
    "resnet18": by_name("resnet18"),
    "lenet": by_name("lenet"),
    "pools": chain(
        lambda: [
            nn.Conv2d(1, 6, 3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.AvgPool2d(2),
        ]
    ),
}


class Hidden(torch.autograd.Function):
    """A kink that no call of PyTorch's shows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, d):
        return d * (ctx.saved_tensors[0] > 0)


class Hiding(nn.Module):
    def forward(self, x):
        return Hidden.apply(x)


KINKED = {
    "leaky": chain(lambda: [nn.Conv2d(1, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.1)]),
    "adaptive": chain(lambda: [nn.Conv2d(1, 8, 3), nn.AdaptiveMaxPool2d(3)]),
    "hidden": chain(lambda: [nn.Conv2d(1, 16, 3), Hiding(), nn.Conv2d(16, 16, 3), Hiding()]),
}


def problem(build, rough, labels=True, seed=0, count=3, local=None, **changes):
    """A matching problem whose guesses are evaluated one by one, and two of its guesses."""
    model, data = build(), tiny_examples(count, classes=CLASSES, side=SIDE)
    model(data.x)
    model.eval()
    seen = replace(observe(model, data), num_classes=CLASSES, local=local)
    objective = Objective(**{"distance": cosine, "one_by_one": True, "rough": rough, **changes})
    fixed = torch.stack([data.y, data.y]) if labels else None
    made = GradientMatching([seen], torch.tensor([0, 0]), fixed, objective)
    return made, torch.rand(2, made.variables, generator=torch.Generator().manual_seed(seed))


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("distance", [cosine, relative])
@pytest.mark.parametrize("net", NETS)
def test_slopes_are_those_of_double_backward(net, distance, labels):
    """On several guesses, with a prior."""
    priors = ((0.01, total_variation),)
    exact, z = problem(NETS[net], False, labels, distance=distance, priors=priors)
    rough, _ = problem(NETS[net], True, labels, distance=distance, priors=priors)
    rows = torch.arange(2)
    for guesses in (z, z.flip(0), 0.5 * z):
        (value, slope), (expected, direction) = rough(guesses, rows), exact(guesses, rows)
        assert torch.allclose(value, expected, rtol=1e-4)
        assert 0 < apart(slope, direction) < 0.02
    assert rough._rough
    assert not exact._rough


@pytest.mark.parametrize("net", NETS)
def test_the_error_is_the_step(net, monkeypatch):
    """In double precision a hundredth of the step has a hundredth of the error, down to rounding."""
    model = NETS[net]().double()
    data = tiny_examples(2, classes=CLASSES, side=SIDE)
    model(data.x.double())
    model.eval()
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    z = data.x.double().requires_grad_()
    v = {n: torch.randn_like(p) for n, p in params.items()}
    found = eager_step(model, cross_entropy)(params, buffers, z, data.y)
    (expected,) = torch.autograd.grad(list(found.values()), z, list(v.values()))
    errors = []
    for step in (1e-4, 1e-6):
        monkeypatch.setattr(difference, "STEP", step)
        passes = Difference(model, cross_entropy, params, buffers)
        g = passes.first(z, data.y, z)
        assert all(torch.allclose(g[n], found[n], atol=1e-10) for n in params)
        errors.append(apart(passes.slope(v, z, data.y, z), expected))
    assert errors[1] < 1e-4
    assert 50 < errors[0] / errors[1] < 200


@pytest.mark.parametrize("net", KINKED)
def test_kinks_that_are_not_followed_are_noticed(net):
    exact, z = problem(KINKED[net], False)
    rough, _ = problem(KINKED[net], True)
    rows = torch.arange(2)
    assert all(torch.equal(a, b) for a, b in zip(rough(z, rows), exact(z, rows), strict=True))
    assert not rough._rough


def test_branches_are_taken_again_whatever_the_input():
    x = torch.tensor([[[[1.0, -2.0], [3.0, -4.0]]]])
    calls = (F.relu, torch.relu, lambda t: t.relu(), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    with Branches() as seen:
        before = [call(x.clone()) for call in calls]
    assert torch.equal(before[0], torch.tensor([[[[1.0, 0.0], [3.0, 0.0]]]]))
    assert float(before[-1]) == 3
    with Branches(seen.taken):
        after = [call(-x) for call in calls]
    assert all(torch.equal(a, -b) for a, b in zip(after, before, strict=True))
    assert torch.equal(F.relu(-x), torch.tensor([[[[0.0, 2.0], [0.0, 4.0]]]]))


def test_no_slope_where_the_distance_has_none():
    made, z = problem(NETS["cnn"], True)
    passes = Difference(made._first.model, cross_entropy, dict(made._first.model.named_parameters()), {})
    leaf = z[:1].clone().requires_grad_()
    x, y = made.decode(leaf, torch.tensor([0]))
    g = passes.first(x[0], y[0], leaf)
    assert not passes.slope({n: torch.zeros_like(t) for n, t in g.items()}, x[0], y[0], leaf).any()


def test_only_one_plain_gradient_is_rough():
    """Not several steps, not bf16, not stacks, not the searches that need all digits."""
    rough = Objective(one_by_one=True, rough=True)
    several = problem(NETS["lenet"], True, local=LocalSpec(2, None, 0.1), simulate=True)[0]
    assert several.steps == 2
    assert not several._rough
    assert not problem(NETS["lenet"], True, precision="bf16")[0]._rough
    assert not problem(NETS["lenet"], True, one_by_one=False)[0]._rough
    surrogate = SurrogateMatching([several._first], torch.tensor([0]), None, rough)
    assert not surrogate._rough
    assert Inverting.rough
    assert not DLG.rough


def test_hard_convolutions_go_one_by_one():
    def alone(name, side, count):
        model = models.build(name, (3, side, side), CLASSES, torch.Generator())
        data = Examples(torch.rand(count, 3, side, side), torch.zeros(count, dtype=torch.long))
        return one_by_one_is_faster(observe(model, data))

    assert alone("convnet16", 32, 1)  # 230 million operations, 187,000 parameters
    assert not alone("convnet16", 12, 1)
    assert not alone("lenet", 32, 16)  # 22 million
    assert alone("lenet", 32, 96)
    assert not alone("mlp", 32, 96)


def test_running_statistics_stay_as_they_are():
    made, z = problem(NETS["convnet16"], True)
    model = made._first.model.train()
    kept = [b.clone() for b in model.buffers()]
    made(z, torch.arange(2))
    one_by_one_is_faster(replace(made._first, num_examples=10**4))
    passes = Difference(model, cross_entropy, dict(model.named_parameters()), dict(model.named_buffers()))
    passes.followed(torch.rand(2, 1, SIDE, SIDE), torch.tensor([0, 1]))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), kept, strict=True))


def test_inverting_finds_as_much_with_either_slope(monkeypatch):
    """A small convolutional network, whose guesses are made to go one by one."""
    data = tiny_examples(1, classes=CLASSES, side=SIDE)
    model = NETS["pools"]()
    model(data.x)
    monkeypatch.setattr(matching, "LARGE", 0)
    seen = replace(observe(model, data), num_classes=CLASSES)
    found = {}
    for rough in (True, False):
        monkeypatch.setattr(Inverting, "rough", rough)
        (result,) = Inverting(steps=300, patience=0).many([seen], [torch.Generator().manual_seed(1)])
        found[rough] = float((result.x - data.x).square().mean())
    assert found[True] != found[False]
    assert found[True] < 1.3 * found[False]
