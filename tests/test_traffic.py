"""What a message is said to weigh is what an encoder makes of it, and a secure sum what its session sent."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_examples, tiny_model

from fltoolkit import registry
from fltoolkit.defense import RoundContext
from fltoolkit.loss import cross_entropy
from fltoolkit.metrics.traffic import Traffic, coded_bytes, plain_traffic
from fltoolkit.secagg import session
from fltoolkit.secagg.cost import paper_bytes
from fltoolkit.secagg.defense import SecureAggregation
from fltoolkit.training.round import run_round
from fltoolkit.training.task import Task
from fltoolkit.types import LocalSpec


def bits(numbers, width):
    """Whole numbers as bits, `width` each."""
    return ((np.asarray(numbers)[:, None] >> np.arange(width)) & 1).astype(np.uint8).ravel()


def whole(values):
    return np.unpackbits(np.asarray(values, np.float32).view(np.uint8))


def encodings(message):
    """The message in each of the four codes, as bits."""
    v = message.numpy()
    at = np.flatnonzero(v)
    table, index = np.unique(v, return_inverse=True)
    yield whole(v)
    yield np.concatenate([(v != 0).astype(np.uint8), whole(v[at])])
    yield np.concatenate([bits(at, math.ceil(math.log2(max(2, len(v))))), whole(v[at])])
    yield np.concatenate([whole(table), bits(index, math.ceil(math.log2(len(table))))])


def messages():
    rng = torch.Generator().manual_seed(0)
    dense = torch.randn(1000, generator=rng)
    yield "dense", dense
    yield "half", dense * (torch.rand(1000, generator=rng) < 0.5)
    yield "few", dense * (torch.rand(1000, generator=rng) < 0.01)
    yield "signs", dense.sign() * 0.25
    yield "levels", (4 * dense).round().clamp(-7, 7) / 4
    yield "zeros", torch.zeros(1000)
    yield "constant", torch.full((1000,), 0.5)
    yield "one", torch.ones(1)


@pytest.mark.parametrize(("name", "message"), list(messages()), ids=lambda v: v if isinstance(v, str) else "")
def test_bytes_are_those_of_the_shortest_encoding(name, message):
    assert coded_bytes(message) == min(len(e) for e in encodings(message)) / 8


def test_defenses_that_save_bytes_do():
    rows = torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))
    ctx = RoundContext(0, 1, (0, 1, 2), torch.full((3,), 1 / 3))
    up = {
        spec: plain_traffic(registry.make_stack([spec]).clients(rows, ctx)).up
        for spec in ("clip:norm=1", "topk:fraction=0.01", "sign", "quantise:levels=1")
    }
    assert up["clip:norm=1"] == 16000
    assert up["topk:fraction=0.01"] == 40 * (32 + 12) / 8
    assert up["sign"] < 4000 / 8 + 16
    assert up["quantise:levels=1"] <= 4000 / 4 + 16


def test_a_model_travels_down():
    assert plain_traffic(torch.zeros(2, 10)) == Traffic(0.0, 40.0)


@pytest.mark.parametrize("spec", ["secagg", "secagg:graph=regular", "lightsecagg", "mpc:servers=3"])
def test_a_secure_sum_weighs_what_its_session_sent(spec, monkeypatch):
    n, dim = 12, 500
    records = []
    original = session.run
    monkeypatch.setattr(session, "run", lambda *a, **k: records.append(original(*a, **k)) or records[-1])
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    ctx = RoundContext(0, 1, tuple(range(n)), torch.full((n,), 1 / n), counts=(1,) * n)
    traffic = registry.make_defense(spec).secure_sum(rows, ctx).traffic
    assert traffic.up >= 4 * (dim + 1)
    if records:
        sent = [sum(t.sent[c] for t in records[0].rounds) for c in range(n)]
        received = [sum(t.received[c] for t in records[0].rounds) for c in range(n)]
        assert (traffic.up, traffic.down) == (np.mean(sent), np.mean(received))
    if spec == "secagg":
        assert (traffic.up + traffic.down) / paper_bytes(n, dim, 32) == pytest.approx(1.12, abs=0.03)


def test_a_round_under_a_secure_sum_adds_the_model_to_what_travels_down(monkeypatch):
    model = tiny_model()
    task = Task(model, cross_entropy, LocalSpec(), registry.make_stack(["secagg"]), 0)
    data = [tiny_examples(2, seed=k) for k in range(5)]
    sums = []
    original = SecureAggregation.secure_sum
    monkeypatch.setattr(SecureAggregation, "secure_sum", lambda *a: sums.append(original(*a)) or sums[-1])
    outcome = run_round(task, task.layout.row(model), range(5), data, 1)
    assert outcome.traffic.up == sums[0].traffic.up
    assert outcome.traffic.down == sums[0].traffic.down + 4 * task.layout.size
    plain = run_round(replace(task, stack=registry.make_stack([])), task.layout.row(model), range(5), data, 1)
    assert plain.traffic is None
