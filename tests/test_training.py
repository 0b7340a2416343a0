"""FedAvg against a plain loop over clients, and the federation's promises."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_examples, tiny_model
from torch import nn

from defenses.clip import Clip
from fltoolkit.algorithms.fedavg import fedavg, fedsgd, select_clients
from fltoolkit.defense import DefenseStack
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.rng import stream
from fltoolkit.training import federation as fed
from fltoolkit.training.local import client_updates
from fltoolkit.training.round import Task, run_round
from fltoolkit.types import Layout, LocalSpec


def plain_client_update(model, data, local, rng):
    """ClientUpdate of McMahan et al. 2017, Algorithm 1, as one reads it, with torch.optim."""
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=local.lr)
    size = len(data) if local.batch is None else local.batch
    batches = torch.from_numpy(rng.permutation(len(data))).split(size)
    for _ in range(local.epochs):
        for b in batches:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(data.x[b]), data.y[b]).backward()
            optimiser.step()
    return model


def task(local, defenses=(), seed=3):
    return Task(tiny_model(), cross_entropy, local, DefenseStack(defenses), seed)


@pytest.mark.parametrize(
    "local", [LocalSpec(1, None, 0.5), LocalSpec(3, 4, 0.5), LocalSpec(2, 5, 0.1), LocalSpec(1, 100, 1.0)]
)
def test_cohort_equals_a_plain_loop_over_clients(local):
    """Clients of different sizes, last batches that are short, batches larger than the data."""
    model, data = tiny_model(), [tiny_examples(n, n) for n in (7, 1, 12, 4)]
    layout = Layout.of(model)
    rows = client_updates(
        model, cross_entropy, layout.row(model), data, local, [np.random.default_rng(k) for k in range(4)]
    )
    for k, d in enumerate(data):
        trained = plain_client_update(model, d, local, np.random.default_rng(k))
        expected = layout.row(trained) - layout.row(model)
        assert (rows[k] - expected).abs().max() < 1e-5
        assert expected.abs().max() > 1e-3


def test_round_is_the_weighted_mean_of_algorithm_1():
    local, data = LocalSpec(2, 3, 0.5), [tiny_examples(n, n) for n in (5, 9)]
    t = task(local)
    layout = Layout.of(t.model)
    ((_, params),) = fedavg(t, layout.row(t.model), data, 1.0, range(1, 2))
    models = [
        plain_client_update(t.model, d, local, stream(t.seed, "round", 1, "client", k, "batches"))
        for k, d in enumerate(data)
    ]
    expected = (5 * layout.row(models[0]) + 9 * layout.row(models[1])) / 14
    assert (params - expected).abs().max() < 1e-5


def test_fedsgd_is_one_gradient_step_on_the_union():
    """With E = 1, B = ∞ the weighted mean of client gradients is the gradient over all their data."""
    data = [tiny_examples(n, n) for n in (5, 9)]
    t = task(fedsgd(0.7))
    layout = Layout.of(t.model)
    ((_, params),) = fedavg(t, layout.row(t.model), data, 1.0, range(1, 2))
    x, y = torch.cat([d.x for d in data]), torch.cat([d.y for d in data])
    loss = nn.functional.cross_entropy(t.model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(t.model.parameters()))])
    assert (params - (layout.row(t.model) - 0.7 * gradient)).abs().max() < 1e-6


def test_cohort_size_is_the_papers_and_cohorts_differ():
    assert len(select_clients(100, 0.0, 1, 1)) == 1
    assert len(select_clients(100, 0.1, 1, 1)) == 10
    assert select_clients(100, 1.0, 1, 1) == list(range(100))
    assert select_clients(100, 0.1, 1, 1) != select_clients(100, 0.1, 1, 2)
    counts = np.bincount([c for r in range(2000) for c in select_clients(10, 0.3, 0, r)], minlength=10)
    assert (abs(counts - 600) < 5 * np.sqrt(2000 * 0.3 * 0.7)).all()


def test_nan_in_a_clients_data_is_named_with_its_layer():
    data = [tiny_examples(4), tiny_examples(4)]
    data[1].x[0, 0, 0, 0] = torch.nan
    t = task(LocalSpec())
    with pytest.raises(InputError, match=r"update of client 8 must be finite.*layer '1\.weight'"):
        run_round(t, Layout.of(t.model).row(t.model), (3, 8), data, 1)


def federation():
    clients = [tiny_examples(6, k) for k in range(5)]
    return fed.Federation(task(LocalSpec(1, 2, 0.3), [Clip(norm=0.5)]), clients, tiny_examples(40, 99), 0.6)


def test_resumed_run_gives_the_numbers_of_the_uninterrupted_one(tmp_path):
    f = federation()
    start = fed.State(Layout.of(f.task.model).row(f.task.model))
    whole = list(fed.federate(f, start, 6))[-1]
    half = list(fed.federate(f, start, 3))[-1]
    fed.save(tmp_path / "c.pt", half, {"seed": 3})
    again = list(fed.federate(federation(), fed.resume(tmp_path / "c.pt", {"seed": 3}), 6))[-1]
    assert torch.equal(again.params, whole.params)
    assert again.history == whole.history
    assert [r.number for r in again.history] == [1, 2, 3, 4, 5, 6]


def test_checkpoint_of_another_run_or_a_broken_one_is_refused(tmp_path):
    f = federation()
    start = fed.State(Layout.of(f.task.model).row(f.task.model))
    fed.save(tmp_path / "c.pt", start, {"seed": 3})
    with pytest.raises(InputError, match="seed must be 3 as in the checkpoint"):
        fed.resume(tmp_path / "c.pt", {"seed": 4})
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="checkpoint must be one that"):
        fed.resume(tmp_path / "broken.pt", {})


def test_accuracy_counts_what_an_argmax_counts():
    f = federation()
    params = Layout.of(f.task.model).row(f.task.model)
    expected = int((f.task.model(f.test.x).argmax(1) == f.test.y).sum())
    assert fed.count_correct(f.task, params, f.test, batch=7) == expected
