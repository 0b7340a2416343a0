"""Priors against plain formulas and against BatchNorm itself."""

from __future__ import annotations

import pytest
import torch
from conftest import observe, tiny_model
from torch import nn

from fltoolkit.errors import InputError
from fltoolkit.inversion.consensus import Consensus
from fltoolkit.inversion.prior import BatchNormStatistics, norm, total_variation
from fltoolkit.types import Examples, Layout

NOTHING = (torch.empty(0), torch.empty(0))


def test_total_variation_of_a_checkerboard_and_of_what_is_no_image():
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2.0
    flat = torch.ones(1, 2, 1, 4, 4)
    both = torch.stack([board, torch.ones(4, 4)])[None, :, None]
    assert total_variation(flat, *NOTHING).tolist() == [0.0]
    assert total_variation(both, *NOTHING).tolist() == [1.0]
    assert total_variation(torch.rand(3, 2, 7), *NOTHING).tolist() == [0.0] * 3
    assert torch.isfinite(total_variation(torch.rand(2, 1, 3, 1, 5), *NOTHING)).all()


def test_norm():
    x = torch.rand(3, 2, 1, 4, 4)
    expected = [sum(float(i.norm()) for i in batch) / 2 for batch in x]
    assert norm(x, *NOTHING).tolist() == pytest.approx(expected)


def normed(seed=0, training=False):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip
    return model.train(training)


def batch(count=6, seed=0):
    return Examples(
        torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 4
    )


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_those_that_batch_norm_takes(training):
    """With momentum 1, a layer in training mode stores the batch's mean and (unbiased) variance."""
    model, data = normed(training=training), batch()
    seen = observe(model, data, auxiliary=data)
    prior = BatchNormStatistics([seen], "estimated")
    probe = normed(training=True)
    if not training:
        probe[1].eval()
    for layer in (probe[1], probe[4]):
        layer.momentum = 1.0
    probe(data.x)
    means = prior.targets[0].split([3, 3, 4, 4])
    torch.testing.assert_close(means[2], probe[4].running_mean, rtol=1e-4, atol=1e-6)
    count = 6
    torch.testing.assert_close(means[3] * count / (count - 1), probe[4].running_var, rtol=1e-4, atol=1e-6)
    row = Layout.of(model).row(model)[None]
    assert prior(data.x[None], row, torch.tensor([0])).item() < 1e-4
    assert prior(1 - data.x[None], row, torch.tensor([0])).item() > 0.01


def test_running_statistics_are_each_victims_own():
    models = [normed(0), normed(1)]
    models[1][1].running_mean += 5.0
    prior = BatchNormStatistics([observe(m, batch()) for m in models], "running")
    rows = torch.stack([Layout.of(m).row(m) for m in models])
    x = batch().x.expand(2, -1, -1, -1, -1).clone().requires_grad_()
    found = prior(x, rows, torch.tensor([0, 1]))
    assert found[1] > found[0] + 3
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert slope.abs().sum() > 0
    assert torch.equal(models[0][1].running_mean, torch.zeros(3))


def test_statistics_that_are_not_there():
    with pytest.raises(InputError, match="statistics must be none for a model without BatchNorm2d"):
        BatchNormStatistics([observe(tiny_model(), batch())], "running")
    with pytest.raises(InputError, match="must have public auxiliary data"):
        BatchNormStatistics([observe(normed(), batch())], "estimated")


class Flat:
    """A problem of two victims with two guesses each, of two inputs and a label logit, without a loss."""

    owner = torch.tensor([0, 0, 1, 1])
    inputs = 2

    def __call__(self, z, rows):
        return torch.zeros(len(z)), torch.zeros_like(z)


def test_consensus_pulls_a_victims_guesses_together_and_no_others():
    z = torch.tensor([[0.0, 0.0, 9.0], [2.0, 4.0, 9.0], [7.0, 7.0, 0.0], [7.0, 7.0, 5.0]])
    loss, gradient = Consensus(Flat(), 0.5)(z, torch.arange(4))
    assert loss.tolist() == [0.5 * 2.5, 0.5 * 2.5, 0.0, 0.0]
    assert gradient.tolist() == [[-0.5, -1.0, 0.0], [0.5, 1.0, 0.0], [0.0] * 3, [0.0] * 3]
    alone, _ = Consensus(Flat(), 0.5)(z[1:], torch.tensor([1, 2, 3]))
    assert alone[0] == 0
