"""The benchmark of example orders draws what it says and keeps what it has run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fedavg_order
from fedavg_order import LOCAL, Buffered, Setting, render, rounds, settings, summary

from fltoolkit import models
from fltoolkit.data import load
from fltoolkit.loss import cross_entropy
from fltoolkit.rng import torch_stream
from fltoolkit.training.engines import choose
from fltoolkit.types import Examples, Layout

ROOT = Path(__file__).parents[1]


def drawn(size, count, seed=0):
    return Buffered(np.random.default_rng(seed), size).permutation(count)


@pytest.mark.parametrize("size", [1, 2, 7, 20, 50])
def test_a_buffer_draws_every_example_once_and_never_looks_further_than_it_holds(size):
    order = drawn(size, 20)
    assert sorted(order) == list(range(20))
    assert all(order[i] < i + size for i in range(20))


def test_a_buffer_of_one_keeps_the_order_and_one_of_all_shuffles_uniformly():
    assert drawn(1, 9).tolist() == list(range(9))
    places = np.array([drawn(3, 3, seed) for seed in range(6000)])
    kinds, counts = np.unique(places, axis=0, return_counts=True)
    assert len(kinds) == 6
    assert abs(counts - 1000).max() < 4 * np.sqrt(1000 * 5 / 6)


@pytest.mark.parametrize("name", ["compiled", "batched"])
def test_engines_visit_the_examples_as_the_buffer_draws_them(name):
    """Against a plain loop of torch.optim over the batches in that order."""
    data = load("digits").train
    some = Examples(data.x[:35], data.y[:35])
    model = models.build("2nn", (1, 8, 8), 10, torch_stream(0, "model"))
    start = Layout.of(model).row(model)
    engine = choose(model, cross_entropy, (1, 8, 8), name)
    (moved,) = engine(start, [some], LOCAL, [Buffered(np.random.default_rng(3), 8)])
    optimiser = torch.optim.SGD(model.parameters(), lr=LOCAL.lr)
    for batch in np.array_split(drawn(8, 35, seed=3), [10, 20, 30]):
        optimiser.zero_grad()
        cross_entropy(model(some.x[batch]), some.y[batch]).mean().backward()
        optimiser.step()
    torch.testing.assert_close(start + moved, Layout.of(model).row(model), rtol=1e-4, atol=1e-5)


def test_rounds_are_those_to_the_target():
    data = load("digits")
    reached, best = rounds(Setting("iid", "shuffled", 0), data, 60, 0.5)
    assert 1 < reached < 60
    assert best >= 0.5
    assert rounds(Setting("iid", "shuffled", 0), data, 1, 0.99)[0] is None


def test_summary_has_a_row_where_all_seeds_were_run():
    runs = {s.name: {"rounds": 100.0, "best": 0.97} for s in settings(2) if s.clients == "iid"}
    half = replace(settings(2)[0], seed=0)
    rows = summary({**runs, half.name: {"rounds": None, "best": 0.9}}, 2)
    assert [(r["clients"], r["order"]) for r in rows] == [("iid", "shuffled"), ("iid", "as they lie")]
    assert rows[0]["mean"] == pytest.approx(100)
    assert "100 [100, 100]" in render(rows)


def test_a_finished_run_is_kept(tmp_path, monkeypatch):
    out, made = tmp_path / "o.json", []
    monkeypatch.setattr(fedavg_order, "mnist", lambda: None)
    monkeypatch.setattr(fedavg_order, "rounds", lambda s, *a: (made.append(s.name), (50.0 + s.seed, 0.97))[1])
    for seeds in (1, 1, 2):
        monkeypatch.setattr(sys, "argv", ["fedavg_order.py", "--seeds", str(seeds), "--out", str(out)])
        fedavg_order.main()
    assert len(made) == len(set(made)) == len(settings(2))
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {r["seeds"] for r in result["rows"]} == {2}
    assert out.with_suffix(".png").exists()
    assert "command" in result


def test_documentation_shows_the_committed_run():
    text = (ROOT / "docs/fedavg-tables.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "benchmarks/results/fedavg_order.json").read_text(encoding="utf-8"))["rows"]
    assert {r["order"] for r in rows} == set(fedavg_order.ORDERS)
    assert render(rows) in text
    shuffled, _, small, kept = [r["mean"] for r in rows if r["clients"] == "shards"]
    plain = " ".join(text.split())
    assert f"needs {kept / shuffled:.1f} times as many rounds" in plain
    assert f"often do, {small / shuffled:.1f} times as many" in plain
