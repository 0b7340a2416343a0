"""The benchmark of bfloat16 trains a known cell again, and times both precisions."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from fedavg_precision import CELLS, TABLES, again, draw, render, times

from fltoolkit.data import load
from fltoolkit.tables import cells, run
from fltoolkit.types import Examples

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks/results/fedavg_precision.json"


def test_a_cell_is_trained_again_at_its_rate(tmp_path, monkeypatch):
    cell = cells.Cell("c", "row", "column", "c", "digits", "cnn", "iid", 20, 0.2, 1, None, 0.3, 20)
    effort = run.Effort(budget=25, resolution=1, start_lr=0.1, most=3)
    known = run.run_cell(cell, effort, tmp_path / "table9", lambda *a: None)
    monkeypatch.setattr(cells, "table", lambda name: cells.Table(name, "Title", "", (cell,)))
    found = again("table9", "c", tmp_path, tmp_path)
    assert found["rounds"]["float32"] == known["rounds"]
    assert found["rounds"]["bf16"] == pytest.approx(known["rounds"], rel=0.2)
    assert found["corners"]["bf16"] != known["runs"][0]["corners"]
    draw({"cells": {"c": found}}, tmp_path / "f.png")
    assert (tmp_path / "f.png").exists()


def test_times_are_of_both_precisions():
    data = load("digits")
    small = replace(data, test=Examples(data.test.x[:20], data.test.y[:20]))
    rows = times("cnn", small, 40, (10, None), 1)
    assert [r["work"] for r in rows][1:] == ["cnn, ten clients, E = 1, B = ∞", "cnn, evaluation"]
    assert all(r["ratio"] == pytest.approx(r["float32"] / r["bf16"]) for r in rows)


def test_documentation_shows_the_committed_run():
    result = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert set(result["cells"]) == {name for _, name in CELLS}
    assert render(result) in (ROOT / "docs/fedavg-tables.md").read_text(encoding="utf-8")
    for table, name in CELLS:
        cell = json.loads((TABLES / table / f"{name}.json").read_text(encoding="utf-8"))
        assert result["cells"][name]["rounds"]["float32"] == cell["rounds"]
        assert cell["effort"].get("precision", "float32") == "float32"
