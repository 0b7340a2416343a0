"""The benchmark of example orders draws what it says and keeps what it has run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fedavg_order
from fedavg_order import Setting, render, rounds, settings, summary, tables

from fltoolkit.data import load

ROOT = Path(__file__).parents[1]


def test_rounds_are_those_to_the_target():
    data = load("digits")
    reached, best = rounds(Setting("iid", "shuffled", 0), data, 60, 0.5)
    assert 1 < reached < 60
    assert best >= 0.5
    assert rounds(Setting("iid", "shuffled", 0), data, 1, 0.99)[0] is None
    orders = {order: rounds(Setting("shards", order, 0), data, 40, 0.99)[1] for order in fedavg_order.ORDERS}
    assert orders["as they lie"] != orders["shuffled"] == orders["buffer of 100"]  # clients hold 14 examples


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
    assert tables(ROOT / "benchmarks/results/tables") in text
    shuffled, _, small, kept = [r["mean"] for r in rows if r["clients"] == "shards"]
    plain = " ".join(text.split())
    assert f"needs {kept / shuffled:.1f} times as many rounds" in plain
    assert f"often do, {small / shuffled:.1f} times as many" in plain
