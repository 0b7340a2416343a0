"""FedAvg against a plain loop over clients, and the federation's promises."""

from __future__ import annotations

import copy
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_examples, tiny_model
from torch import nn

from defenses.clip import Clip
from defenses.gaussian import Gaussian
from fltoolkit.algorithms.fedavg import fedavg, fedsgd, select_clients
from fltoolkit.defense import DefenseStack
from fltoolkit.errors import InputError
from fltoolkit.loss import IGNORE, cross_entropy
from fltoolkit.rng import stream
from fltoolkit.training import federation as fed
from fltoolkit.training import round as rounds
from fltoolkit.training import task as tasks
from fltoolkit.training.budget import Budget
from fltoolkit.training.clients import Dealt
from fltoolkit.training.engines import choose
from fltoolkit.training.evaluate import Evaluation, evaluate
from fltoolkit.training.log import METRICS, RoundLog
from fltoolkit.training.round import run_round
from fltoolkit.training.task import Task
from fltoolkit.types import Examples, Layout, LocalSpec

pytestmark = pytest.mark.usefixtures("two_threads")


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


def task(local, defenses=(), seed=3, **changes):
    return Task(tiny_model(), cross_entropy, local, DefenseStack(defenses), seed, **changes)


def start(t):
    return Layout.of(t.model).row(t.model)


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


def test_learning_rate_decays_by_round_and_the_server_has_its_own():
    """With E = 1, B = ∞ an update is −η times a gradient, so the two rates can be read off."""
    data = [tiny_examples(6)]
    plain, decayed = task(fedsgd(0.5)), task(fedsgd(0.5), lr_decay=0.5)
    first, third = (
        [run_round(t, start(t), [0], data, n).aggregate for n in (1, 3)] for t in (plain, decayed)
    )
    assert torch.equal(first[0], third[0])
    assert torch.allclose(first[1] / 4, third[1], atol=1e-7)
    slow = task(fedsgd(0.5), server_lr=0.1)
    ((_, params),) = fedavg(slow, start(slow), data, 1.0, range(1, 2))
    assert torch.allclose(params, start(slow) + 0.1 * first[0], atol=1e-7)
    assert run_round(decayed, start(decayed), [0], data, 3).transcript.local.lr == 0.125


def test_a_cohort_streams_in_chunks_to_the_same_mean(monkeypatch):
    """Witnessed or not, in one chunk or in many, with defenses on clients and at the server."""
    data = [tiny_examples(3 + k % 4, k) for k in range(9)]
    t = task(LocalSpec(1, 2, 0.3), [Clip(norm=0.1), Gaussian(noise_multiplier=0.1, placement="server")])
    whole = run_round(t, start(t), range(9), data, 1)
    monkeypatch.setattr(rounds, "CHUNK_BYTES", 4 * t.layout.size * 2)
    chunked = run_round(t, start(t), range(9), data, 1, witnessed=False)
    seen = run_round(t, start(t), range(9), data, 1)
    assert torch.equal(chunked.aggregate, seen.aggregate)
    assert (chunked.aggregate - whole.aggregate).abs().max() < 1e-6
    assert whole.aggregate.abs().max() > 1e-2
    assert chunked.transcript is None
    assert chunked.clients == seen.clients == tuple(range(9))
    assert torch.allclose(chunked.norms, seen.transcript.updates.delta.norm(dim=1))
    assert seen.transcript.messages.shape == (9, t.layout.size)


def test_one_engine_trains_all_rounds(monkeypatch):
    """What it keeps between calls, such as recorded programs, would be lost with it."""
    built = []
    monkeypatch.setattr(tasks, "choose", lambda *setting: built.append(setting) or choose(*setting))
    t, data = task(LocalSpec(1, 2, 0.3)), [tiny_examples(4, k) for k in range(3)]
    params = start(t)
    for number in (1, 2, 3):
        params = params + run_round(t, params, range(3), data, number).aggregate
    assert len(built) == 1


def test_memory_of_a_round_does_not_grow_with_the_cohort(monkeypatch):
    """Rows of 40 clients are never held at once: the fold sees chunks of two."""
    seen = []
    t = task(LocalSpec(1, 2, 0.3))
    monkeypatch.setattr(rounds, "CHUNK_BYTES", 4 * t.layout.size * 2)
    fold = rounds._Fold._train
    monkeypatch.setattr(
        rounds._Fold, "_train", lambda self, data: seen.append((len(data), self.rows)) or fold(self, data)
    )
    run_round(t, start(t), range(40), [tiny_examples(3, k) for k in range(40)], 1, witnessed=False)
    assert [n for n, _ in seen] == [2] * 20
    assert all(kept == [] for _, kept in seen)


class Clients(list):
    """Clients of which some cannot be read or hold what no model can train on."""

    def __getitem__(self, k):
        if k == 1:
            raise OSError("disk is gone")
        return super().__getitem__(k)


def failing_clients():
    data = Clients(tiny_examples(4 + k, k) for k in range(6))
    list.__getitem__(data, 2).x[0, 0, 0, 0] = torch.nan
    list.__setitem__(data, 4, Examples(torch.rand(3, 7), torch.tensor([0, 1, 2])))
    return data


@pytest.mark.parametrize("engine", ["compiled", "batched", "looped", "vmapped", "graphed"])
def test_clients_that_fail_are_left_out_and_the_weights_renormalised(engine):
    t = task(LocalSpec(1, 2, 0.3), stop_on_failure=False, engine=engine)
    outcome = run_round(t, start(t), range(6), failing_clients(), 1)
    good = task(LocalSpec(1, 2, 0.3), engine=engine)
    data = list(failing_clients())
    expected = run_round(good, start(good), [0, 3, 5], data, 1)
    assert outcome.clients == (0, 3, 5)
    assert (outcome.aggregate - expected.aggregate).abs().max() < 1e-6
    reasons = {f.client: f.reason for f in outcome.failures}
    assert reasons[1] == "must have readable data, got OSError: disk is gone"
    assert reasons[2] == "must be finite, got NaN or infinity in layer '1.weight'"
    assert reasons[4].startswith("must train, got ")
    assert outcome.transcript.weights.tolist() == pytest.approx([4 / 20, 7 / 20, 9 / 20])


def test_a_round_stops_at_a_failure_where_told_to_or_where_none_is_left():
    t = task(LocalSpec(1, 2, 0.3))
    with pytest.raises(InputError, match=r"update of client 1 must have readable data, got OSError"):
        run_round(t, start(t), range(6), failing_clients(), 1)
    with pytest.raises(InputError, match=r"round 7 must have a client that succeeds.*client 1 must have"):
        run_round(replace(t, stop_on_failure=False), start(t), [1], failing_clients(), 7)


def test_nan_in_a_clients_data_is_named_with_its_layer():
    data = {3: tiny_examples(4), 8: tiny_examples(4)}
    data[8].x[0, 0, 0, 0] = torch.nan
    t = task(LocalSpec())
    with pytest.raises(InputError, match=r"update of client 8 must be finite.*layer '1\.weight'"):
        run_round(t, start(t), (3, 8), data, 1)


def test_a_million_idle_clients_cost_nothing():
    """The cohort of 100 is drawn and cut out without touching the other clients."""
    examples = tiny_examples(50)
    clients = Dealt(examples, np.arange(10**6).reshape(-1, 1) % 50)
    t = task(LocalSpec(1, None, 0.1))
    tracemalloc.start()
    next(fedavg(t, start(t), clients, 1e-4, range(1, 2), lambda _: False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(select_clients(10**6, 1e-4, 0, 1)) == 100
    assert peak < 2e6
    assert torch.equal(clients[10**6 - 1].x, examples.x[49:])


def federation(rounds_between=1, target=None):
    clients = [tiny_examples(6, k) for k in range(5)]
    t = task(LocalSpec(1, 2, 0.3), [Clip(norm=0.5)])
    return fed.Federation(t, clients, tiny_examples(40, 99), 0.6, rounds_between, target)


def test_resumed_run_gives_the_numbers_of_the_uninterrupted_one(tmp_path):
    f = federation()
    whole = list(fed.federate(f, fed.State(start(f.task)), 6))[-1].state
    half = list(fed.federate(f, fed.State(start(f.task)), 3))[-1].state
    fed.save(tmp_path / "c.pt", replace(half, seconds=1000.0), {"seed": 3})
    again = list(fed.federate(federation(), fed.resume(tmp_path / "c.pt", {"seed": 3}), 6))[-1].state
    assert torch.equal(again.params, whole.params)
    assert again.history == whole.history
    assert [r.number for r in again.history] == [1, 2, 3, 4, 5, 6]
    assert again.seconds > 1000 > whole.seconds > half.seconds > 0


def test_checkpoint_of_another_run_or_a_broken_one_is_refused(tmp_path):
    f = federation()
    fed.save(tmp_path / "c.pt", fed.State(start(f.task)), {"seed": 3})
    with pytest.raises(InputError, match="seed must be 3 as in "):
        fed.resume(tmp_path / "c.pt", {"seed": 4})
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="checkpoint must be one that"):
        fed.resume(tmp_path / "broken.pt", {})
    for content in ({"config": 3}, {"history": [()]}, {"history": 3}):
        torch.save(torch.load(tmp_path / "c.pt") | content, tmp_path / "broken.pt")
        with pytest.raises(InputError, match="checkpoint must be one that"):
            fed.resume(tmp_path / "broken.pt", {"seed": 3})


def test_evaluation_every_few_rounds_and_after_the_last():
    f = federation(3)
    state = list(fed.federate(f, fed.State(start(f.task)), 7))[-1].state
    assert [n for n, _ in state.evaluated] == [3, 6, 7]


def test_the_round_before_the_budget_ends_is_evaluated():
    private = task(LocalSpec(1, 2, 0.1), [Clip(norm=1.0), Gaussian(noise_multiplier=2.0)])
    f = replace(federation(50), task=private)
    budget = Budget(messages_hidden=False, delta=1e-5)
    costs = [budget.largest(budget.spent([f.events_of(n) for n in range(1, k + 1)])) for k in (1, 2, 3, 4)]
    budget.limit = (costs[2] + costs[3]) / 2
    state = list(fed.federate(f, fed.State(start(private)), 20, budget=budget))[-1].state
    assert state.round == 3
    assert [n for n, _ in state.evaluated] == [3]


def test_a_poisson_cohort_of_nobody_ever_is_refused():
    with pytest.raises(InputError, match="fraction must be above 0 with sampling 'poisson', got 0"):
        replace(federation(), fraction=0.0, sampling="poisson")


def test_training_stops_at_the_target_and_a_finished_run_stays_finished():
    f = federation()
    curve = [t.accuracy for _, t in list(fed.federate(f, fed.State(start(f.task)), 12))[-1].state.evaluated]
    target = sorted(curve)[6]
    stopped = list(fed.federate(federation(target=target), fed.State(start(f.task)), 12))[-1].state
    assert stopped.round == next(i for i, a in enumerate(curve, 1) if a >= target)
    assert list(fed.federate(federation(target=target), stopped, 12)) == []


def test_failed_clients_are_out_of_the_privacy_events():
    """Noise of m equal clients adds up to √m of one's."""
    noisy = task(LocalSpec(), [Clip(), Gaussian(placement="client")])
    f = replace(federation(), task=noisy, clients=[tiny_examples(4)] * 30)
    for failed in ((), f.cohort(1)[:1]):
        events = {e.view: e.event.noise_multiplier for e in f.events_of(1, failed)}
        assert events["message"] == 1
        assert events["sum"] == pytest.approx((len(f.cohort(1)) - len(failed)) ** 0.5)


def test_log_holds_every_round_and_every_client(tmp_path):
    f = federation(2)
    log = RoundLog(tmp_path, 0)
    for step in fed.federate(f, fed.State(start(f.task)), 4):
        log(step)
    log.close()
    lines = [json.loads(s) for s in (tmp_path / METRICS).read_text().splitlines()]
    assert [s["round"] for s in lines] == [1, 2, 3, 4]
    assert [s["accuracy"] is None for s in lines] == [True, False, True, False]
    assert [c["client"] for c in lines[2]["clients"]] == f.cohort(3)
    assert lines[3]["accuracy"] == step.state.history[-1].test.accuracy
    norms = step.outcome.norms.tolist()
    assert [c["update_norm"] for c in lines[3]["clients"]] == norms
    assert min(norms) > 0


def test_log_drops_what_came_after_the_checkpoint(tmp_path):
    (tmp_path / METRICS).write_text('{"round": 1}\n{"round": 2}\n{"round": 3}\n{"rou')
    RoundLog(tmp_path, 2).close()
    assert (tmp_path / METRICS).read_text() == '{"round": 1}\n{"round": 2}\n'
    RoundLog(tmp_path, 0).close()
    assert (tmp_path / METRICS).read_text() == ""


def test_tensorboard_reads_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    f = federation()
    log = RoundLog(tmp_path, 0)
    for step in fed.federate(f, fed.State(start(f.task)), 3):
        log(step)
    log.close()

    def read():
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [(e.step, e.value) for e in events.Scalars("round/accuracy")]

    assert read() == [(n, pytest.approx(t.accuracy)) for n, t in step.state.evaluated]
    log = RoundLog(tmp_path, 0)  # another run in the same folder
    log(next(fed.federate(f, fed.State(start(f.task)), 3)))
    log.close()
    assert [n for n, _ in read()] == [1]


def test_accuracy_counts_what_an_argmax_counts(monkeypatch):
    f = federation()
    params = start(f.task)
    logits = f.task.model(f.test.x)
    monkeypatch.setattr("fltoolkit.training.evaluate.BATCH_VALUES", 7 * 25)
    found = evaluate(f.task, params, f.test)
    assert found.correct == int((logits.argmax(1) == f.test.y).sum())
    assert found.total == 40
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, f.test.y).item(), rel=1e-5)


class NextToken(nn.Module):
    """Scores over 5 tokens at each of T positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 5)

    def forward(self, x):
        return self.table(x)


def test_sequences_count_tokens_and_pass_over_padding():
    x = torch.tensor([[1, 2, 3], [4, 0, 0]])
    y = torch.tensor([[2, 3, 4], [1, IGNORE, IGNORE]])
    model = NextToken()
    logits = model(x)
    losses = [
        nn.functional.cross_entropy(logits[0], y[0]),
        nn.functional.cross_entropy(logits[1, :1], y[1, :1]),
    ]
    assert cross_entropy(logits, y).tolist() == pytest.approx([v.item() for v in losses])
    t = Task(model, cross_entropy, LocalSpec(), DefenseStack([]), 0)
    found = evaluate(t, t.layout.row(model), Examples(x, y))
    right = (logits.argmax(-1) == y) & (y != IGNORE)
    assert (found.correct, found.total) == (int(right.sum()), 4)
    assert found.loss == pytest.approx(sum(v.item() for v in losses) / 2)


def test_interval_of_an_evaluation_is_clopper_pearson():
    from scipy.stats import binomtest

    exact = binomtest(37, 50).proportion_ci(0.95, "exact")
    assert Evaluation(37, 50, 0.0).ci95 == pytest.approx((exact.low, exact.high))
