"""Stacked Adam against torch.optim.Adam, its schedule and its box."""

from __future__ import annotations

import pytest
import torch

from fltoolkit.errors import InputError
from fltoolkit.inversion.adam import Adam, Schedule


def quadratic(z, rows):
    centre = torch.arange(z.shape[1]).to(z) + rows[:, None]
    return (z - centre).square().sum(1), 2 * (z - centre)


@pytest.mark.parametrize("signed", [False, True])
def test_equals_torch_row_by_row(signed):
    start = torch.randn(3, 4)
    mine = Adam(quadratic, start, Schedule(0.1, 16), signed)
    theirs = [start[i].clone().requires_grad_() for i in range(3)]
    for i, z in enumerate(theirs):
        adam = torch.optim.Adam([z], lr=0.1)
        decay = torch.optim.lr_scheduler.MultiStepLR(adam, [6, 10, 14], 0.1)
        for _ in range(16):
            _, gradient = quadratic(z.detach()[None], torch.tensor([i]))
            z.grad = gradient[0].sign() if signed else gradient[0]
            adam.step()
            decay.step()
    for _ in range(16):
        mine.step()
    torch.testing.assert_close(mine.z, torch.stack(theirs).detach(), rtol=1e-5, atol=1e-6)
    assert mine.evaluations == 3 * 17
    assert mine.finished.all()


def test_box_units_and_keep():
    mine = Adam(
        quadratic,
        torch.full((2, 3), 0.5),
        Schedule(0.5, 100, "none"),
        box=(torch.zeros(3), torch.tensor([1.0, 1.0, torch.inf])),
        unit=torch.tensor([1.0, 1.0, 0.1]),
    )
    mine.step()
    torch.testing.assert_close(mine.z[0], torch.tensor([0.0, 1.0, 0.55]))
    mine.keep(torch.tensor([1]))
    mine.step()
    assert mine.rows.tolist() == [1]
    assert (mine.z >= 0).all()
    assert (mine.z[:, :2] <= 1).all()


def test_a_row_that_diverges_stands_still_and_harms_no_other():
    def broken(z, rows):
        loss, gradient = quadratic(z, rows)
        return torch.where(rows == 0, torch.nan, loss), gradient

    mine = Adam(broken, torch.zeros(2, 3), Schedule(0.1, 10))
    mine.step()
    assert mine.stalled.tolist() == [True, False]
    assert torch.equal(mine.z[0], torch.zeros(3))
    assert torch.isinf(mine.loss[0])
    assert torch.isfinite(mine.loss[1])


def test_schedules():
    clock = torch.tensor([0.0, 37.0, 38.0, 63.0, 88.0, 100.0])
    torch.testing.assert_close(
        Schedule(1.0, 100).at(clock), torch.tensor([1.0, 1.0, 0.1, 0.01, 0.001, 0.001])
    )
    torch.testing.assert_close(
        Schedule(2.0, 100, "cosine").at(torch.tensor([0.0, 50.0, 100.0])), torch.tensor([2.0, 1.0, 0.0])
    )
    torch.testing.assert_close(
        Schedule(1.0, 100, "none", 10).at(torch.tensor([0.0, 4.0, 20.0])), torch.tensor([0.1, 0.5, 1.0])
    )
    step = Schedule(1.0, 80)
    assert step.hastened(torch.tensor([5.0, 40.0, 69.0, 75.0])).tolist() == [30.0, 50.0, 70.0, 80.0]
    assert step.settled(torch.tensor([69.0, 70.0])).tolist() == [False, True]


@pytest.mark.parametrize(("change", "match"), [({"lr": 0}, "lr must be > 0"), ({"decay": "x"}, "decay")])
def test_impossible_schedules(change, match):
    with pytest.raises(InputError, match=match):
        Schedule(**({"lr": 0.1, "steps": 5} | change))
