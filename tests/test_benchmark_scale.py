"""The scale benchmark measures what it says, and its idle clients cost nothing before they are asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fedavg_scale
from fedavg_scale import Run, Sizes, Windows, idle_rounds, isolated, line, report, spread
from scale_figure import draw, show

TINY = Sizes(
    cohorts=(2, 8), registered=(20, 10**6), sampled=5, few=4, rounds=2, fractions=(0.5, 1.0), epochs=(1, 2),
    clients=4, per_client=10, client_epochs=3,
)  # fmt: skip
CELLS = {"C=0.5 E=1": 2, "C=0.5 E=2": 4, "C=1 E=1": 4, "C=1 E=2": 8}


def test_clients_are_made_when_asked_for_and_only_those():
    run = Run("2nn", clients=10**6, size=4, total=20, seed=0)
    assert (len(run.clients), run.windows.made) == (10**6, 0)
    seconds = list(run.rounds(5 / 10**6, epochs=1, count=3))
    assert run.windows.made == 3 * 5
    assert len(seconds) == 3
    assert min(seconds) > 0


def test_a_clients_examples_are_its_window_of_the_pool():
    run = Run("2nn", clients=7, size=4, total=10, seed=0)
    for k in range(7):
        places = [(4 * k + i) % 10 for i in range(4)]
        assert Windows(7, 4, 10)[k].tolist() == places
        assert torch.equal(run.clients[k].x, torch.stack([run.clients.examples.x[i] for i in places]))
    with pytest.raises(IndexError):
        run.clients[7]


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedavg_scale, "wait_until_quiet", lambda patience: float("nan"))
        return report(TINY, turns=1, seed=0)


def test_every_size_is_measured(result):
    measured = result["measured"]
    names = ["cohort of 2", "cohort of 8", "20 registered", "1000000 registered"]
    assert list(measured) == [*names, "cells"]
    for name in names:
        assert measured[name]["seconds"]["min"] > 0
        assert 20 < measured[name]["growth_mib"]["median"] < 2000
    assert [measured[n]["clients_made"]["median"] for n in names] == [2, 8, 5, 5]
    assert {n for n, t in measured["cells"].items() if t["min"] > 0} == set(CELLS)
    assert result["linear"]["client_epochs"] == CELLS
    assert result["seed"] == 0
    assert result["busy_before_turn"] == [None]


def test_memory_of_few_clients_is_their_updates_at_least(result):
    """One update of the CNN has 1,663,370 numbers of 4 bytes; 8 clients train in one chunk."""
    memory = result["memory"]
    assert memory["one_update_mib"] == pytest.approx(6.3453, abs=1e-4)
    (few,), (many,) = (result["measured"][f"cohort of {k}"]["growth_mib"]["turns"] for k in (2, 8))
    assert many - few > 4 * memory["one_update_mib"]
    assert memory["largest_to_smallest"]["turns"] == [many / few]
    assert memory["under_limit"]


def test_idle_ratios_are_most_over_fewest(result):
    fewest, most = (result["measured"][f"{n} registered"] for n in TINY.registered)
    for name in ("seconds", "select_seconds", "growth_mib"):
        expected = most[name]["median"] / fewest[name]["median"]
        assert result["idle"]["most_to_fewest"][name]["median"] == pytest.approx(expected)


def test_a_large_parent_does_not_count():
    """800 MiB that the parent has touched are in the ru_maxrss of its children."""
    ballast = np.ones(100 << 20)
    assert isolated(idle_rounds, TINY, 20, 0)["growth_mib"] < ballast.nbytes / 2**20 / 2


def test_line_through_exact_times_is_found():
    turn = {name: 0.5 + 0.25 * n for name, n in CELLS.items()}
    found = line(TINY, [turn, {name: 3 * t for name, t in turn.items()}, turn])
    assert found["seconds_fixed"] == pytest.approx(0.5)
    assert found["seconds_each"] == pytest.approx(0.25)
    assert found["r_squared"] == pytest.approx(1.0)
    assert found["largest_to_smallest"]["turns"] == pytest.approx([(2.5 / 8) / (1.0 / 2)] * 3)
    squares = line(TINY, [{name: float(n * n) for name, n in CELLS.items()}])
    assert squares["r_squared"] < 0.99
    assert squares["largest_to_smallest"]["median"] == pytest.approx(4.0)


def test_spread_is_median_and_ends():
    assert spread([3.0, 1.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0, "turns": [3.0, 1.0, 10.0]}


def test_result_is_json_a_table_and_a_figure(result, tmp_path, capsys):
    read = json.loads(json.dumps(result, allow_nan=False))
    show(read)
    out = capsys.readouterr().out
    for text in ("cohort of 8", "1000000 registered", "C=0.5 E=2", "memory under 4096 MiB", "client-epochs"):
        assert text in out
    draw(tmp_path / "scale.png", read)
    assert Image.open(tmp_path / "scale.png").size[0] > 1500


@pytest.mark.parametrize("flags", [["--turns", "0"], ["--seed", "-1"]])
def test_bad_flags_are_refused(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fedavg_scale.py", *flags])
    with pytest.raises(SystemExit, match="turns must be >= 1 and seed >= 0"):
        fedavg_scale.main()
