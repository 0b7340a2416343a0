"""The benchmark of initial weights draws what it says and trains from it; the documentation shows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fedavg_init
from fedavg_init import draw_as_in_2015, drawn_as_in_2015, render, train

from fltoolkit import models
from fltoolkit.tables import cells

ROOT = Path(__file__).parents[1]


def rng():
    return torch.Generator().manual_seed(0)


def test_weights_are_a_cut_off_normal_distribution():
    model = models.build("cnn", (1, 28, 28), 10, rng())
    draw_as_in_2015(model, rng())
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert set(p.tolist()) == {0.0 if name.startswith("0.") else p.new_tensor(0.1).item()}
        else:
            assert float(p.detach().abs().max()) <= 0.2
            if p.numel() > 10_000:  # 0.88 of 0.1 is what the cut leaves of the deviation
                assert float(p.detach().std()) == pytest.approx(0.088, rel=0.01)


def test_only_models_built_inside_are_drawn_so():
    def build():
        return next(models.build("cnn", (1, 8, 8), 4, rng()).parameters()).detach()

    before = build()
    with drawn_as_in_2015():
        assert not torch.equal(build(), before)
    assert torch.equal(build(), before)


def test_a_rate_is_trained_from_them(tmp_path, monkeypatch):
    cell = cells.Cell(fedavg_init.CELL, "r", "c", "l", "digits", "cnn", "iid", 20, 0.2, 1, 10, 0.99, 20)
    monkeypatch.setattr(cells, "table", lambda name: cells.Table(name, "Title", "", (cell,)))
    found = train(-4, 3, tmp_path)
    assert found["ran"] == 3
    assert found["lr"] == pytest.approx(0.0464, abs=1e-4)
    assert not list(tmp_path.iterdir())


def test_documentation_shows_the_committed_run():
    path = ROOT / "benchmarks/results/fedavg_init.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result["runs"]) == {str(i) for i in fedavg_init.RATES}
    assert render(result) in (ROOT / "docs/fedavg-tables.md").read_text(encoding="utf-8")
