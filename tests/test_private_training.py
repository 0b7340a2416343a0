"""Defenses on the gradients of single examples: DP-SGD against a slow loop that reads like its paper."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch
from conftest import tiny_examples, tiny_model
from torch import nn

from defenses.clip import Clip
from defenses.clip_layers import ClipLayers
from defenses.gaussian import Gaussian
from defenses.normalise import Normalise
from fltoolkit.accounting import gaussian_epsilon
from fltoolkit.cli import main
from fltoolkit.defense import DefenseStack, Sampling
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.rng import stream, torch_stream
from fltoolkit.training import federation as fed
from fltoolkit.training.budget import Budget, smallest
from fltoolkit.training.private.local import batches
from fltoolkit.training.round import run_round
from fltoolkit.training.task import Task, example_context
from fltoolkit.types import Layout, LocalSpec

DPSGD = [Clip(norm=0.3, level="example"), Gaussian(noise_multiplier=0.7, level="example")]


def task(defenses, local, **changes):
    return Task(tiny_model(), cross_entropy, local, DefenseStack(defenses), 3, **changes)


def start(t):
    return Layout.of(t.model).row(t.model)


def slow_dpsgd(t, data, client, number, norm, sigma):
    """Abadi et al. 2016, Algorithm 1, one example at a time, with the toolkit's random numbers."""
    model, size = tiny_model(), min(t.local.batch or len(data), len(data))
    params = list(model.parameters())
    velocity = torch.zeros(sum(p.numel() for p in params))
    rng = stream(t.seed, "round", number, "client", client, "batches")
    for step in range(t.local.steps(len(data))):
        chosen = range(len(data))
        if size < len(data):
            chosen = np.flatnonzero(rng.random(len(data)) < size / len(data))
        total = torch.zeros_like(velocity)
        for i in chosen:
            loss = nn.functional.cross_entropy(model(data.x[i : i + 1]), data.y[i : i + 1])
            g = torch.cat([v.flatten() for v in torch.autograd.grad(loss, params)])
            total += g / max(1.0, float(g.norm()) / norm)
        key = ("round", number, "client", client, "step", step, "server", "defense", "gaussian")
        noise = torch.randn(len(total), generator=torch_stream(t.seed, *key))
        with torch.no_grad():
            row = torch.cat([p.flatten() for p in params])
            gradient = (total + sigma * norm * noise) / size
            velocity = t.local.momentum * velocity + gradient + t.local.weight_decay * row
            new = row - t.local.lr * velocity
            for p, part in zip(params, new.split([p.numel() for p in params]), strict=True):
                p.copy_(part.view_as(p))
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize("engine", ["auto", "opacus"])
@pytest.mark.parametrize(
    "local",
    [LocalSpec(2, 4, 0.5), LocalSpec(1, None, 0.3), LocalSpec(2, 5, 0.2, momentum=0.9, weight_decay=0.01)],
)
def test_local_training_is_algorithm_1(local, engine):
    t, data = task(DPSGD, local, engine=engine), [tiny_examples(11, 4), tiny_examples(6, 5)]
    outcome = run_round(t, start(t), [0, 1], data, 2)
    rows = outcome.transcript.updates.delta
    for c in (0, 1):
        expected = slow_dpsgd(t, data[c], c, 2, 0.3, 0.7) - start(t)
        assert (rows[c] - expected).norm() <= 1e-5 * expected.norm()


def test_any_list_of_defenses_acts_on_examples_as_it_does_on_clients():
    """The mean of per-example rows after the stack, in a single full-batch step of size 1."""
    data, t = tiny_examples(9, 4), task([Normalise(norm=0.2, level="example")], LocalSpec(1, None, 1.0))
    row = run_round(t, start(t), [0], [data], 1).transcript.updates.delta[0]
    model = tiny_model()
    expected = torch.zeros_like(row)
    for i in range(len(data)):
        loss = nn.functional.cross_entropy(model(data.x[i : i + 1]), data.y[i : i + 1])
        g = torch.cat([v.flatten() for v in torch.autograd.grad(loss, list(model.parameters()))])
        expected -= 0.2 * g / g.norm() / len(data)
    assert (row - expected).norm() <= 1e-5 * expected.norm()


def test_layers_are_clipped_inside_local_training():
    data = tiny_examples(9, 4)
    t = task([ClipLayers(norm=0.2, level="example")], LocalSpec(1, None, 1.0))
    row = run_round(t, start(t), [0], [data], 1).transcript.updates.delta[0]
    parts = row.split(t.layout.sizes)
    assert all(float(p.norm()) <= 0.1 * (1 + 1e-6) for p in parts)
    assert float(row.norm()) <= 0.2


def test_batches_are_poisson_samples():
    """Sizes of 4,000 steps: mean n q, variance n q (1 − q), within four standard errors."""
    ctx = replace(example_context(task(DPSGD, LocalSpec(1, 20, 1.0)), 1, 0, 100), steps=4000)
    assert ctx.sampling == Sampling("poisson", 0.2, 100)
    found = list(batches(ctx, np.random.default_rng(0)))
    sizes = np.array([len(b) for b in found], float)
    assert abs(sizes.mean() - 20) < 4 * np.sqrt(16 / 4000)
    assert abs(sizes.var() - 16) < 4 * 16 * np.sqrt(2 / 4000)
    each = np.bincount(np.concatenate(found), minlength=100) / 4000
    assert abs(each - 0.2).max() < 5 * np.sqrt(0.16 / 4000)


def test_empty_batches_still_get_noise_and_are_counted():
    """q = 1/2 over two examples: a quarter of the batches is empty."""
    t = task(DPSGD, LocalSpec(100, 1, 0.1))
    outcome = run_round(t, start(t), [0], [tiny_examples(2)], 1)
    steps = list(batches(example_context(t, 1, 0, 2), stream(3, "round", 1, "client", 0, "batches")))
    assert outcome.empty_batches == sum(len(b) == 0 for b in steps)
    assert 20 < outcome.empty_batches < 80
    bad = tiny_examples(2)
    bad = replace(bad, y=bad.y + 99)
    among = replace(t, stop_on_failure=False)
    assert (
        run_round(among, start(t), [0, 1], [tiny_examples(2), bad], 1).empty_batches == outcome.empty_batches
    )
    silent = task([Clip(norm=1e-9, level="example"), DPSGD[1]], LocalSpec(100, 1, 0.1))
    assert float(run_round(silent, start(silent), [0], [tiny_examples(2)], 1).norms[0]) > 0


def test_epsilon_of_examples_is_that_of_the_busiest_client():
    t = task(DPSGD, LocalSpec(2, 5, 0.5))
    data = [tiny_examples(20, 1), tiny_examples(40, 2)]
    f = fed.Federation(t, data, tiny_examples(5), 1.0)
    budget = Budget(False, 1e-5)
    budget.rounds = [f.events_of(n) for n in (1, 2, 3)]
    spent = budget.spent()
    of = [gaussian_epsilon(0.7, 5 / n, 3 * 2 * -(-n // 5), 1e-5) for n in (20, 40)]
    assert spent["example"]["message"] == pytest.approx(max(of), rel=1e-3)
    assert spent["example"]["aggregate"] == pytest.approx(max(of), rel=1e-3)
    assert "client" not in spent


def test_client_and_example_levels_have_separate_ledgers():
    t = task([*DPSGD, Clip(norm=1.0), Gaussian(noise_multiplier=2.0)], LocalSpec(1, 5, 0.5))
    f = fed.Federation(t, [tiny_examples(20)] * 4, tiny_examples(5), 1.0)
    spent = Budget(False, 1e-5, rounds=[f.events_of(1)]).spent()
    assert spent["client"]["message"] == inf
    assert spent["client"]["aggregate"] == pytest.approx(gaussian_epsilon(2.0, 1, 1, 1e-5), rel=1e-3)
    assert spent["example"]["message"] == pytest.approx(gaussian_epsilon(0.7, 0.25, 4, 1e-5), rel=1e-3)


def test_batch_norm_is_refused_with_its_layer_and_a_remedy():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 4))
    t = Task(model, cross_entropy, LocalSpec(), DefenseStack(DPSGD), 0)
    with pytest.raises(InputError, match=r"'1'.*BatchNorm2d.*GroupNorm"):
        t.check((1, 5, 5))


@pytest.mark.parametrize(
    ("target", "expected"), [(1.0, 1.0), (0.01, 0.01), (3000.0, 3000.0), (0.7071, 0.7071)]
)
def test_smallest_is_found_from_above(target, expected):
    found = smallest(lambda x: x >= target)
    assert expected <= found <= expected * 1.0002


TRAIN = ["train", "--data", "digits", "--model", "mlp", "--clients", "20", "--fraction", "0.5", "--json"]
TRAIN += ["--epochs", "1", "--batch", "16", "--lr", "0.5"]


def train(capsys, tmp_path, *extra):
    code = main([*TRAIN, "--out", str(tmp_path / "run"), *extra])
    out = capsys.readouterr()
    return code, json.loads(out.out) if out.out else None, out.err


CENTRAL = ["--defense", "clip:norm=0.5", "--defense", "gaussian:noise_multiplier=1"]


def test_epsilon_asked_for_is_met_and_not_exceeded(tmp_path, capsys):
    code, report, _ = train(capsys, tmp_path, "--rounds", "3", *CENTRAL, "--epsilon", "4")
    assert code == 0
    assert 4 * 0.999 < report["epsilon"]["aggregate"] <= 4
    assert report["epsilon"]["message"] is None
    sigma = report["defenses"][1]["noise_multiplier"]
    assert gaussian_epsilon(sigma, 1, 3, 1e-5) == pytest.approx(report["epsilon"]["aggregate"], rel=1e-3)


def test_noise_for_an_epsilon_stays_that_of_its_rounds(tmp_path, capsys):
    """Rounds that were run under less noise than more of them call for would cost more than was asked."""
    asked = [*CENTRAL[:2], "--defense", "gaussian", "--epsilon", "4", "--resume"]
    whole = train(capsys, tmp_path, "--rounds", "3", *asked)[1]
    assert train(capsys, tmp_path, "--rounds", "3", *asked)[1]["epsilon"] == whole["epsilon"]
    for more, words in (
        (["--rounds", "9"], "rounds must be 3"),
        (["--delta", "1e-3"], "delta must be 1e-05"),
    ):
        code, _, err = train(capsys, tmp_path, "--rounds", "3", *asked, *more)
        assert code == 2
        assert words in err


def test_a_budget_may_begin_with_a_round_of_nobody(tmp_path, capsys):
    extra = ["--rounds", "9", "--sampling", "poisson", "--fraction", "0.02", "--seed", "1"]
    defenses = ["--defense", "clip:norm=0.5,level=example", "--defense", "gaussian:level=example"]
    code, report, err = train(capsys, tmp_path, *extra, *defenses, "--epsilon-budget", "50")
    assert code == 0, err
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["clients"] == []
    assert 0 < report["epsilon"]["example"]["aggregate"] < 50


def test_a_budget_that_ends_before_an_evaluation_was_due_has_one(tmp_path, capsys):
    extra = ["--rounds", "9", *CENTRAL, "--epsilon-budget", "9", "--eval-every", "8"]
    code, report, _ = train(capsys, tmp_path, *extra)
    assert code == 0
    assert [a["round"] for a in report["accuracy"]] == [report["rounds"]]
    assert report["rounds"] < 8


def test_budget_ends_the_run_before_the_round_that_would_exceed_it(tmp_path, capsys):
    code, report, _ = train(capsys, tmp_path, "--rounds", "9", *CENTRAL, "--epsilon-budget", "9")
    assert code == 0
    assert report["ended"] == "budget"
    done = report["rounds"]
    assert gaussian_epsilon(1, 1, done, 1e-5) <= 9 < gaussian_epsilon(1, 1, done + 1, 1e-5)
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    spent = [line["epsilon"]["client"]["aggregate"] for line in lines]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(report["epsilon"]["aggregate"])


def test_a_resumed_run_keeps_to_the_same_budget(tmp_path, capsys):
    few = ["--rounds", "1", *CENTRAL]
    train(capsys, tmp_path, *few)
    _, report, _ = train(capsys, tmp_path, "--rounds", "9", *CENTRAL, "--epsilon-budget", "9", "--resume")
    whole = train(capsys, tmp_path / "other", "--rounds", "9", *CENTRAL, "--epsilon-budget", "9")[1]
    assert report["rounds"] == whole["rounds"]
    assert report["accuracy"][-1]["value"] == whole["accuracy"][-1]["value"]


def test_adaptive_clip_remembers_its_norm_through_a_resumption(tmp_path, capsys):
    defense = ["--defense", "adaptive-clip:norm=0.1", "--defense", "gaussian:noise_multiplier=0.1"]
    train(capsys, tmp_path / "a", "--rounds", "2", *defense)
    _, parts, _ = train(capsys, tmp_path / "a", "--rounds", "4", *defense, "--resume")
    _, whole, _ = train(capsys, tmp_path / "b", "--rounds", "4", *defense)
    assert parts["accuracy"][-1] == whole["accuracy"][-1]


def test_poisson_cohorts_are_amplified_and_may_be_empty(tmp_path, capsys):
    extra = ["--rounds", "6", "--sampling", "poisson", "--fraction", "0.05", "--clients", "20", *CENTRAL]
    code, report, _ = train(capsys, tmp_path, *extra)
    assert code == 0
    assert report["epsilon"]["adjacency"] == "add-remove"
    assert report["epsilon"]["aggregate"] == pytest.approx(gaussian_epsilon(1, 0.05, 6, 1e-5), rel=1e-3)
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 in [len(line["clients"]) for line in lines]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--epsilon", "0"], "epsilon must be a finite number > 0"),
        (["--epsilon", "1"], "epsilon must come with one defense that has a noise_multiplier, got 0"),
        (["--epsilon-budget", "1", "--defense", "clip:norm=1"], "epsilon_budget must come with a defense"),
        (["--epsilon-budget", "1", "--defense", "adaptive-clip"], "epsilon_budget must come with a defense"),
        ([*CENTRAL, "--epsilon-budget", "0.01"], "epsilon_budget must be at least "),
        (["--server-lr", "inf"], "server_lr must be a finite number > 0, got inf"),
        (["--sampling", "poisson", "--fraction", "0", *CENTRAL], "fraction must be above 0 with sampling"),
        (["--sampling", "most", *CENTRAL], "sampling must be one of"),
        (["--defense", "gaussian:level=example"], "gaussian must come after a clip"),
        (["--defense", "clip:level=layer"], "level must be one of"),
        (["--engine", "looped", "--defense", "clip:level=example"], "engine must be auto or opacus"),
    ],
)
def test_impossible_flags_are_refused(extra, words, tmp_path, capsys):
    code, _, err = train(capsys, tmp_path, *extra)
    assert code == 2
    assert words in err


def test_delta_beyond_the_number_of_clients_warns(tmp_path, capsys):
    _, _, err = train(capsys, tmp_path, "--rounds", "1", *CENTRAL, "--delta", "0.1")
    assert "warning: delta 0.1" in err


@pytest.mark.parametrize(("flags", "rate"), [(["--equal-weights"], 0.1), ([], 1.0)])
def test_only_clients_that_count_alike_are_amplified(flags, rate, tmp_path, capsys):
    """71 or 72 digits a client."""
    extra = ["--fraction", "0.1", "--rounds", "2", *CENTRAL[:2], "--defense", "gaussian:noise_multiplier=8"]
    _, report, _ = train(capsys, tmp_path, *extra, *flags)
    sampled = {} if rate == 1 else {"adjacency": "zero-out", "sampling": "fixed", "population": 20}
    expected = gaussian_epsilon(8, rate, 2, 1e-5, **sampled)
    assert report["epsilon"]["aggregate"] == pytest.approx(expected, rel=1e-3)
