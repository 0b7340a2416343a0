"""The client that an attack runs through against the one that trains."""

from __future__ import annotations

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model
from torch import nn

from fltoolkit.inversion.distance import squared
from fltoolkit.inversion.matching import GradientMatching, Objective
from fltoolkit.types import Examples, Layout, LocalSpec

RECIPES = [
    LocalSpec(1, None, 0.3),
    LocalSpec(5, None, 0.1),
    LocalSpec(2, 2, 0.1),
    LocalSpec(2, 4, 0.2, momentum=0.9, weight_decay=0.01),
]


def trained(model, data, local):
    """w_u − w_0 of one client whose batches are consecutive, by a loop over `torch.optim.SGD`."""
    from copy import deepcopy

    copy = deepcopy(model)
    sgd = torch.optim.SGD(copy.parameters(), local.lr, local.momentum, weight_decay=local.weight_decay)
    size = local.batch or len(data)
    for _ in range(local.epochs):
        for x, y in zip(data.x.split(size), data.y.split(size), strict=True):
            sgd.zero_grad()
            nn.functional.cross_entropy(copy(x), y).backward()
            sgd.step()
    return Layout.of(model).row(copy) - Layout.of(model).row(model)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("local", RECIPES, ids=lambda r: f"E{r.epochs}B{r.batch}m{r.momentum}")
def test_the_truth_has_distance_zero(local, one_by_one):
    model, data = tiny_model(), tiny_examples(6)
    seen = observe(model, data, update=trained(model, data, local), local=local)
    objective = Objective(squared, simulate=True, one_by_one=one_by_one)
    problem = GradientMatching([seen], torch.tensor([0]), data.y[None], objective)
    loss, _ = problem(data.x.flatten()[None], torch.tensor([0]))
    assert loss.item() < 1e-10 * problem.scale.item()
    other, _ = problem(1 - data.x.flatten()[None], torch.tensor([0]))
    assert other.item() > 1e-3 * problem.scale.item()


def test_several_clients_send_the_mean_of_their_updates():
    model, data, local = tiny_model(), tiny_examples(6), LocalSpec(3, 1, 0.2)
    parts = [Examples(x, y) for x, y in zip(data.x.chunk(3), data.y.chunk(3), strict=True)]
    mean = torch.stack([trained(model, p, local) for p in parts]).mean(0)
    seen = observe(model, data, update=mean, local=local, clients=3)
    problem = GradientMatching([seen], torch.tensor([0]), data.y[None], Objective(simulate=True))
    loss, _ = problem(data.x.flatten()[None], torch.tensor([0]))
    assert loss.item() < 1e-10 * problem.scale.item()


def test_gradient_through_local_steps_is_that_of_finite_differences():
    torch.set_default_dtype(torch.float64)
    try:
        model, data, local = tiny_model().double(), tiny_examples(4), LocalSpec(2, 2, 0.3)
        data = Examples(data.x.double(), data.y)
        seen = observe(model, data, update=trained(model, data, local), local=local)
        problem = GradientMatching([seen], torch.zeros(1, dtype=int), data.y[None], Objective(simulate=True))
        z, row = torch.rand(1, problem.variables), torch.tensor([0])
        _, gradient = problem(z, row)
        for i in (0, 17, 55, 99):
            step = torch.zeros_like(z)
            step[0, i] = 1e-5
            slope = (problem(z + step, row)[0] - problem(z - step, row)[0]) / 2e-5
            assert gradient[0, i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_stacked_and_one_by_one_agree():
    models = [tiny_model(s) for s in range(3)]
    seen = [observe(m, tiny_examples(2, s)) for s, m in enumerate(models)]
    owner, rows = torch.tensor([0, 1, 1, 2]), torch.arange(4)
    labels = torch.tensor([[0, 1]] * 4)
    z = torch.rand(4, 50)
    stacked = GradientMatching(seen, owner, labels)(z, rows)
    alone = GradientMatching(seen, owner, labels, Objective(one_by_one=True))(z, rows)
    for a, b in zip(stacked, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_labels_are_fixed_row_by_row():
    model, data = tiny_model(), tiny_examples(2)
    labels = torch.stack([data.y, data.y.flip(0)])
    problem = GradientMatching([observe(model, data)], torch.tensor([0, 0]), labels)
    loss, _ = problem(data.x.flatten().expand(2, -1), torch.arange(2))
    assert loss[0] < 1e-12
    assert data.y[0] == data.y[1] or loss[1] > 1e-6
