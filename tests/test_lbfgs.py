"""The batched L-BFGS against scipy, a textbook recursion, and its own promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der

from fltoolkit.inversion.lbfgs import LBFGS


def rosenbrock(z, rows):
    """A stack of Rosenbrock functions, problem r shifted by r / 10."""
    z = z - rows[:, None] / 10
    loss = (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(1)
    gradient = torch.zeros_like(z)
    gradient[:, :-1] += -400 * z[:, :-1] * (z[:, 1:] - z[:, :-1] ** 2) - 2 * (1 - z[:, :-1])
    gradient[:, 1:] += 200 * (z[:, 1:] - z[:, :-1] ** 2)
    return loss, gradient


def two_loop(pairs, gradient):
    """H g by the recursion of Nocedal 1980, one problem, lists of (s, y)."""
    q, alphas = gradient.copy(), []
    for s, y in reversed(pairs):
        a = s @ q / (s @ y)
        q -= a * y
        alphas.append(a)
    s, y = pairs[-1]
    q *= (s @ y) / (y @ y)
    for (s, y), a in zip(pairs, reversed(alphas), strict=True):
        q += s * (a - (y @ q) / (s @ y))
    return q


def test_helper_agrees_with_scipy_rosenbrock():
    z = torch.randn(3, 6, dtype=torch.float64)
    loss, gradient = rosenbrock(z, torch.zeros(3))
    for i in range(3):
        assert loss[i].item() == pytest.approx(rosen(z[i].numpy()))
        np.testing.assert_allclose(gradient[i], rosen_der(z[i].numpy()), rtol=1e-9)


@pytest.mark.parametrize("history", [3, 8, 50])
def test_direction_equals_the_two_loop_recursion(history):
    """Also after the ring has wrapped, which history 3 and 8 do within 20 steps."""
    z = torch.randn(2, 10, dtype=torch.float64)
    optimiser = LBFGS(rosenbrock, z, history)
    pairs = [[], []]
    for _ in range(20):
        before, gradient = optimiser.z.clone(), optimiser.gradient.clone()
        optimiser.step()
        for r in range(2):
            s, y = (optimiser.z - before)[r].numpy(), (optimiser.gradient - gradient)[r].numpy()
            if s @ y > 1e-10 * (y @ y):
                pairs[r] = [*pairs[r], (s, y)][-history:]
        if min(map(len, pairs)) == min(history, optimiser.taken):
            expected = [-two_loop(pairs[r], optimiser.gradient[r].numpy()) for r in range(2)]
            np.testing.assert_allclose(optimiser._direction().numpy(), expected, rtol=1e-6, atol=1e-12)


def test_stack_reaches_the_minimum_that_scipy_reaches():
    z = torch.randn(5, 8, dtype=torch.float64)
    optimiser = LBFGS(rosenbrock, z, 20)
    for _ in range(300):
        optimiser.step()
    for r in range(5):
        best = minimize(rosen, z[r].numpy() - r / 10, jac=rosen_der, method="L-BFGS-B").fun
        assert optimiser.loss[r] <= max(best, 1e-10)


def test_rows_do_not_influence_each_other():
    z = torch.randn(4, 6, dtype=torch.float64)
    together = LBFGS(rosenbrock, z, 10)
    alone = LBFGS(lambda z, rows: rosenbrock(z, rows + 2), z[2:3], 10)
    for _ in range(30):
        together.step()
        alone.step()
    np.testing.assert_allclose(together.z[2], alone.z[0], rtol=1e-6)


def test_keep_drops_rows_and_goes_on_as_before():
    z = torch.randn(4, 6, dtype=torch.float64)
    whole, part = LBFGS(rosenbrock, z, 5), LBFGS(rosenbrock, z, 5)
    for step in range(20):
        if step == 7:
            part.keep(torch.tensor([1, 3]))
        whole.step()
        part.step()
    assert part.rows.tolist() == [1, 3]
    np.testing.assert_allclose(part.z, whole.z[[1, 3]], rtol=1e-6)


def test_loss_never_increases_even_where_the_function_breaks():
    def cliff(z, rows):
        loss = (z**2).sum(1) - 1
        loss = torch.where(z[:, 0] < 0.5, torch.nan, loss)
        return loss, 2 * z * 100

    optimiser = LBFGS(cliff, torch.full((3, 4), 2.0), 5)
    before = optimiser.loss.clone()
    for _ in range(15):
        optimiser.step()
        assert (optimiser.loss <= before).all()
        before = optimiser.loss.clone()


def test_a_start_that_is_not_finite_stalls_and_the_others_go_on():
    def objective(z, rows):
        loss = (z**2).sum(1)
        return torch.where(rows == 1, torch.nan, loss), 2 * z

    optimiser = LBFGS(objective, torch.ones(3, 4), 5)
    for _ in range(5):
        optimiser.step()
    assert optimiser.stalled[1]
    assert optimiser.loss[1] == torch.inf
    assert (optimiser.loss[[0, 2]] < 1e-8).all()


def test_where_every_step_climbs_the_row_stays_and_stalls():
    def lying(z, rows):
        return (z**2).sum(1), -2 * z

    optimiser = LBFGS(lying, torch.full((2, 3), 1.5), 5)
    for _ in range(3):
        optimiser.step()
    assert optimiser.z.tolist() == [[1.5] * 3] * 2
    assert optimiser.loss.tolist() == [6.75] * 2
    assert optimiser.stalled.all()
