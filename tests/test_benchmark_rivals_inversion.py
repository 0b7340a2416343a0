"""breaching, as the benchmarks call it, inverts gradients and leaves the model alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from rivals import inversion_breaching as rival

from fltoolkit.errors import InputError
from fltoolkit.metrics.image import psnr
from fltoolkit.types import LocalSpec

if not rival.available():
    pytest.skip("breaching is not installed", allow_module_level=True)

SHAPE, CLASSES = (3, 8, 8), 5
CIFAR = {"mean": (0.4915, 0.4823, 0.4468), "std": (0.2470, 0.2435, 0.2616)}


def net() -> nn.Module:
    """A LeNet of sigmoids in small, started as DLG's, with a BatchNorm whose mode matters."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.BatchNorm2d(12),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(192, CLASSES),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.5, 0.5)
    return model.eval()


def images(count: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.rand(count, *SHAPE, generator=rng), 1 + torch.arange(count) % (CLASSES - 1)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))


def attack(model: nn.Module, seen: list[Tensor], kind: str, iterations: int, **options) -> rival.Result:
    options = {"labels": None, "seed": 0} | options
    return rival.reconstruct(
        model, seen, input_shape=SHAPE, num_classes=CLASSES, kind=kind, iterations=iterations, **options
    )


@pytest.mark.parametrize(("kind", "iterations", "least"), [("dlg", 1000, 30.0), ("idlg", 1000, 30.0)])
def test_deep_leakage_brings_one_image_back(kind, iterations, least):
    model, (x, y) = net(), images(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = gradients(model, x, y)
    told: list[tuple[int, int, str]] = []
    found = attack(model, seen, kind, iterations, progress=lambda *said: told.append(said))
    assert float(psnr(found.x, x, 1.0)) > least
    assert found.x.shape == x.shape
    assert found.y.shape == y.shape
    if kind == "idlg":
        assert found.y.tolist() == y.tolist()
    assert 0 < found.iterations <= iterations
    assert found.seconds_per_iteration == found.seconds / found.iterations > 0
    assert told[0][:2] == (0, iterations)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_alone_decides():
    model, (x, y) = net(), images(1)
    seen = gradients(model, x, y)
    torch.manual_seed(7)
    first = attack(model, seen, "idlg", 40)
    state = torch.random.get_rng_state()
    torch.manual_seed(8)
    assert torch.equal(first.x, attack(model, seen, "idlg", 40).x)
    torch.manual_seed(7)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first.x, attack(model, seen, "idlg", 40, seed=1).x)


@pytest.mark.parametrize("kind", ["invertinggradients", "seethroughgradients"])
def test_images_stay_in_the_range_and_in_the_datas_units(kind):
    x, y = images(2)
    model = rival.Denormalised(net(), **CIFAR)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in CIFAR.values())
    seen = gradients(model, (x - mean) / std, y)
    for plain, wrapped in zip(gradients(net(), x, y), seen, strict=True):
        assert torch.allclose(plain, wrapped, atol=1e-5)
    found = attack(model, seen, kind, 60, labels=y, batch=2, **CIFAR)
    assert found.x.shape == x.shape
    assert found.x.min() > -1e-5
    assert found.x.max() < 1 + 1e-5
    assert found.y.tolist() == y.tolist()
    assert found.iterations == 60


def test_local_steps_are_simulated():
    """Images come back through two steps of one example each, and not where the steps are taken for one."""
    model, (x, y) = net(), images(2)
    client, local = net(), LocalSpec(1, 1, 0.5)
    optimiser = torch.optim.SGD(client.parameters(), lr=local.lr)
    for a, b in zip(x.split(1), y.split(1), strict=True):
        optimiser.zero_grad()
        nn.functional.cross_entropy(client(a), b).backward()
        optimiser.step()
    with torch.no_grad():
        update = [a - b for a, b in zip(client.parameters(), model.parameters(), strict=True)]
    found = attack(model, update, "idlg", 300, labels=y, batch=2, local=local)
    assert psnr(found.x, x, 1.0).min() > 40
    assert found.y.tolist() == y.tolist()
    merged = attack(model, update, "idlg", 300, labels=y, batch=2, local=LocalSpec(1, 2, 1.0))
    assert psnr(merged.x, x, 1.0).min() < 15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "dgl"}, "did you mean 'dlg'"),
        ({"kind": "dlg", "labels": torch.tensor([0])}, "labels must be None for 'dlg'"),
        ({"kind": "idlg", "labels": torch.tensor([0, 1])}, r"labels must be \[1\], got \(2,\)"),
        ({"kind": "idlg", "iterations": 0}, "iterations must be >= 1, got 0"),
        ({"kind": "invertinggradients", "local": LocalSpec(1, 1, 0.1)}, "labels must be given"),
        (
            {"kind": "idlg", "local": LocalSpec(1, 3, 0.1), "batch": 4, "labels": torch.arange(4)},
            "local.batch must be a divisor of 4, got 3",
        ),
        (
            {"kind": "idlg", "local": LocalSpec(momentum=0.9), "labels": torch.tensor([0])},
            "local must be plain SGD",
        ),
    ],
)
def test_what_breaching_cannot_do_is_refused(options, words):
    model, (x, y) = net(), images(1)
    with pytest.raises(InputError, match=words):
        attack(model, gradients(model, x, y), **({"iterations": 20} | options))
