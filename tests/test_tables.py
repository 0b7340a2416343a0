"""The FedAvg paper's tables: its numbers as data, rounds to a target, the search, resumable cells."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil, inf
from pathlib import Path

import numpy as np
import pytest
import torch

from fltoolkit.commands.table import TableOptions, run_table
from fltoolkit.data.dataset import Dataset
from fltoolkit.errors import InputError
from fltoolkit.report.files import write_json
from fltoolkit.tables import cells, figure1, run, search, seeds, show
from fltoolkit.training.evaluate import Evaluation
from fltoolkit.training.round import _Fold
from fltoolkit.types import Examples


def test_papers_numbers_are_those_printed():
    """Spot checks of each table against the paper, the speed-ups that it prints among them."""
    numbers = {c.id: c for name in cells.names() for c in cells.table(name).cells}
    assert numbers["2nn-C0.1-B10-iid"].paper_rounds == 87
    assert numbers["2nn-C0.5-Binf-noniid"].paper_rounds is None
    assert numbers["lstm-E5-B10-role"].paper_rounds == 41
    printed = {
        "2nn-C1.0-B10-noniid": 8.6,
        "cnn-C1.0-B10-noniid": 9.9,
        "cnn-E20-B10-iid": 34.8,
        "cnn-E5-Binf-noniid": 0.5,
        "lstm-E5-B10-role": 95.3,
        "fedavg-0.82": 49.2,
    }
    for cell, factor in printed.items():
        c = numbers[cell]
        assert numbers[c.baseline].paper_rounds / c.paper_rounds == pytest.approx(factor, abs=0.06)
    assert [len(cells.table(n).cells) for n in cells.names()] == [20, 20, 18, 12, 9]


def test_u_is_the_expected_number_of_local_updates():
    """u = E n / (K B) with n / K = 600 on MNIST."""
    for c in cells.table("table2-mnist").cells:
        assert c.u == pytest.approx(c.E * 600 / (c.B or 600))


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ([(1, 0.2), (2, 0.4), (3, 0.8)], 0.6, 2.5),
        ([(1, 0.2), (2, 0.4), (3, 0.3), (4, 0.8)], 0.6, 3.5),
        ([(5, 0.2), (10, 0.6)], 0.6, 10.0),
        ([(1, 0.7)], 0.6, 1.0),
        ([(1, 0.2), (2, 0.5)], 0.6, None),
        ([], 0.6, None),
    ],
)
def test_rounds_to_a_target_interpolate_the_best_so_far_curve(curve, target, expected):
    """In the second case the best before the crossing is 0.4, held until round 3."""
    assert search.rounds_to(curve, target) == (None if expected is None else pytest.approx(expected))


def test_rounds_equal_numpys_interpolation_of_the_running_maximum():
    rng = np.random.default_rng(0)
    for _ in range(50):
        curve = [(i + 1, a) for i, a in enumerate(np.clip(rng.normal(np.linspace(0.1, 0.9, 40), 0.1), 0, 1))]
        best = np.maximum.accumulate([a for _, a in curve])
        keep = np.r_[True, np.diff(best) > 0]
        corners = search.improvements(curve)
        assert corners == [(n, a) for (n, a), k in zip(curve, keep, strict=True) if k]
        target = float(best[0] + 0.5 * (best[-1] - best[0]))
        expected = np.interp(target, best, np.arange(1, 41))
        i = int(np.argmax(best >= target))
        expected = i + (target - best[i - 1]) / (best[i] - best[i - 1])
        assert search.rounds_to(curve, target) == pytest.approx(expected)


def landscape(best, width=6, calls=None):
    """Rounds that grow away from index `best`; beyond `width` indices the target is not reached."""

    def train(index, cap):
        rounds = 10.0 + 5 * abs(index - best)
        reached = rounds <= cap and abs(index - best) <= width
        if calls is not None:
            calls.append((index, cap))
        accuracy = 1 - abs(index - best) / 100
        return search.Run(index, 10.0**index, rounds if reached else None, 0, accuracy, "", (), 0.0)

    return train


@pytest.mark.parametrize("start", [-7, -1, 0, 4])
def test_search_ends_with_the_best_in_the_interior(start):
    runs, interior = search.search(landscape(0), start, 30)
    best = min(runs, key=lambda r: r.order)
    assert (best.index, interior) == (0, True)
    assert {-1, 0, 1} <= {r.index for r in runs}


def test_search_walks_by_accuracy_where_no_rate_reaches_the_target():
    runs, interior = search.search(landscape(2, width=-1), -3, 30)
    assert (min(runs, key=lambda r: r.order).index, interior) == (2, True)


def test_search_caps_what_cannot_win_and_stops_at_most():
    calls = []
    search.search(landscape(0, calls=calls), 0, 30)
    assert calls == [(0, inf), (1, 10.0), (-1, 10.0)]
    runs, interior = search.search(landscape(9), 0, 4)
    assert len(runs) == 4
    assert not interior


def easy_data():
    """Four classes that a linear model tells apart, 200 training and 100 test examples."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 4
    x = 0.5 * torch.randn(300, 1, 4, 4, generator=rng)
    x[torch.arange(300), 0, y, y] += 1.5
    train, test = Examples(x[:200], y[:200]), Examples(x[200:], y[200:])
    return Dataset("easy", train, test, 4)


@pytest.fixture
def cell(monkeypatch):
    monkeypatch.setattr(run, "load", lambda name: easy_data())
    run._data.cache_clear()
    run._clients.cache_clear()
    yield cells.Cell("c", "row", "column", "c", "easy", "softmax", "iid", 10, 0.3, 1, 5, 0.85, 20)
    run._data.cache_clear()
    run._clients.cache_clear()


def silent(*args):
    pass


def test_cell_finds_the_rate_and_keeps_its_result(cell, tmp_path):
    effort = run.Effort(budget=40, resolution=1, start_lr=0.01)
    result = run.run_cell(cell, effort, tmp_path, silent)
    assert result["interior"]
    assert result["rounds"] < 40
    reached = {r["lr"]: r["rounds"] for r in result["runs"]}
    assert result["rounds"] == min(v for v in reached.values() if v is not None)
    assert result["lr"] > 0.01
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    before = (tmp_path / "c.json").read_bytes()
    assert run.run_cell(cell, effort, tmp_path, silent) == json.loads(before)
    assert (tmp_path / "c.json").read_bytes() == before


def test_killed_cell_goes_on_to_the_same_result(cell, tmp_path, monkeypatch):
    """Killed in the middle of a learning rate, twice; the checkpoint is written after every round."""
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    effort = run.Effort(budget=30, resolution=1)
    whole = run.run_cell(cell, effort, tmp_path / "whole", silent)
    folder = tmp_path / "cut"

    def killer(after):
        seen = iter(range(10**6))

        def report(*args):
            if next(seen) == after:
                raise KeyboardInterrupt

        return report

    for after in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            run.run_cell(cell, effort, folder, killer(after))
        assert not (folder / "c.json").exists()
    cut = run.run_cell(cell, effort, folder, silent)
    for r in (*cut["runs"], *whole["runs"]):
        r.pop("seconds")
    assert cut["runs"] == whole["runs"]
    assert cut["rounds"] == whole["rounds"]


def killed_in_its_second_rate(cell, effort, folder):
    rates = set()

    def killer(what, *args):
        rates.add(what)
        if len(rates) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_cell(cell, effort, folder, killer)
    return next((folder / "c.part").glob("*.json")).stem


@pytest.fixture
def begun(cell, tmp_path):
    """The effort of a cell of which one probe is kept."""
    effort = run.Effort(budget=9, resolution=1, probe=3)
    assert killed_in_its_second_rate(cell, effort, tmp_path) == "probe-1"
    return effort


def test_a_kept_rate_that_reached_the_target_is_taken_at_a_larger_budget(cell, tmp_path):
    effort = run.Effort(budget=30, resolution=1)
    assert killed_in_its_second_rate(cell, effort, tmp_path) == "run-1"
    ran = []
    result = run.run_cell(cell, replace(effort, budget=40), tmp_path, lambda what, *_: ran.append(what))
    assert {r["lr"]: r["ended"] for r in result["runs"]}[0.1] == "target"
    assert "c lr 0.1 seed 0" not in ran


@pytest.mark.parametrize(("changes", "again"), [({}, False), ({"probe": 5}, True), ({"probe": 2}, True)])
def test_a_kept_rate_is_taken_where_a_new_run_would_be_the_same(cell, tmp_path, begun, changes, again):
    probed = []
    effort = replace(begun, **changes)
    result = run.run_cell(cell, effort, tmp_path, lambda what, n, most, _: probed.append((what, most)))
    assert (("c lr 0.1 seed 0", effort.probe) in probed) == again
    assert {r["ran"] for r in result["probes"]} == {effort.probe}


def test_a_checkpoint_beyond_a_smaller_budget_is_not_taken_up(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    effort = run.Effort(budget=30, resolution=1, probe=9)

    def killer(what, number, *args):
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_cell(cell, effort, tmp_path, killer)
    result = run.run_cell(cell, replace(effort, probe=2), tmp_path, silent)
    assert {r["ran"] for r in result["probes"]} == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 2}, r"lr must be 0.1 as in .*, got 0\.316"),
        ({"precision": "bf16"}, r"precision must be 'float32' as in .*, got 'bf16'"),
        ({"seed": 1}, "seed must be 0"),
        ({"eval_every": 2}, "eval_every must be 1"),
    ],
)
def test_a_kept_rate_of_another_configuration_is_refused(cell, tmp_path, begun, changes, message):
    effort = replace(begun, start_lr=10**-0.5 if "resolution" in changes else 0.1, **changes)
    with pytest.raises(InputError, match=message):
        run.run_cell(cell, effort, tmp_path, silent)
    with pytest.raises(InputError, match="C must be"):
        run.run_cell(replace(cell, C=0.5), begun, tmp_path, silent)


@pytest.mark.parametrize(
    ("changes", "effort", "message"),
    [
        ({"data": "other"}, {}, "data must be 'easy' as in .*c.json', got 'other'"),
        ({"buffer": 3}, {}, "buffer must be None as in .*c.json', got 3"),
        ({}, {"seed": 1}, "seed must be 0 as in .*c.json', got 1"),
    ],
)
def test_a_finished_cell_stands_for_its_own_setting_and_seed_alone(cell, tmp_path, changes, effort, message):
    begun = run.Effort(budget=2, resolution=1, probe=1)
    first = json.loads(json.dumps(run.run_cell(cell, begun, tmp_path, silent)))
    assert run.run_cell(cell, replace(begun, budget=9, precision="bf16"), tmp_path, silent) == first
    with pytest.raises(InputError, match=message):
        run.run_cell(replace(cell, **changes), replace(begun, **effort), tmp_path, silent)


def test_what_cannot_be_read_is_named(cell, tmp_path):
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(InputError, match=r"must be a readable JSON object, got '.*c\.json'"):
        run.run_cell(cell, run.Effort(), tmp_path, silent)


@pytest.mark.parametrize("lacking", ["test part", "fitting model"])
def test_data_that_cannot_be_used_stops_before_anything_is_made(cell, tmp_path, monkeypatch, lacking):
    data = easy_data()
    if lacking == "test part":
        monkeypatch.setattr(run, "load", lambda name: replace(data, test=None))
        message = "data must have a test part, got 'easy', which has none"
    else:
        cell, message = replace(cell, model="charlstm"), "must get lines of token ids"
    with pytest.raises(InputError, match=message):
        run.run_cell(cell, run.Effort(), tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("every", [True, False])
def test_a_client_that_fails_for_want_of_memory_says_nothing_of_a_rate(cell, tmp_path, monkeypatch, every):
    train = _Fold._rows

    def full(self, members, examples):
        if every or 0 in members:
            raise MemoryError("no more")
        return train(self, members, examples)

    monkeypatch.setattr(_Fold, "_rows", full)
    with pytest.raises(InputError, match=r"client \d must train, got MemoryError: no more"):
        run.train_at(tmp_path / "x.pt", replace(cell, C=1.0), run.Effort(budget=3), 0, inf, 0.85, silent)


@pytest.mark.parametrize(("lasting", "interior"), [(0, True), (-1, False)])
def test_a_rate_is_at_the_edge_unless_its_neighbours_were_tried(
    cell, tmp_path, monkeypatch, lasting, interior
):
    """Probes of -1, 0 and 1, of which 0 is best; where it diverges later, -1 is what is left."""

    def trained(path, cell, effort, index, cap, target, report):
        if path.stem.startswith("probe"):
            return search.Run(
                index, effort.lr(index), None, 3, 0.5 - abs(index) / 9 - index / 99, "cap", (), 0.0
            )
        ended, rounds = ("target", 9.0) if index == lasting else ("diverged", None)
        return search.Run(index, effort.lr(index), rounds, 9, 0.9, ended, (), 0.0)

    monkeypatch.setattr(run, "train_at", trained)
    effort = run.Effort(budget=9, resolution=1, start_lr=1.0, probe=3)
    result = run.run_cell(cell, effort, tmp_path, silent)
    assert sorted(r["index"] for r in result["probes"]) == [-1, 0, 1]
    assert (result["lr"], result["interior"]) == (effort.lr(lasting), interior)


COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "tables"


@pytest.mark.parametrize(
    "path", sorted(COMMITTED.glob("*/*.json")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_a_committed_cell_holds_the_runs_of_its_own_effort_and_no_others(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    if path.stem == "figure1":
        return
    effort = run.Effort(**result["effort"])
    for r in result["runs"] + result["probes"]:
        assert r["lr"] == effort.lr(r["index"])
    for r in result["probes"]:
        assert r["ran"] == effort.probe or r["ended"] == "diverged"
    for r in result["runs"]:
        crossed = [n for n, accuracy in r["corners"] if accuracy >= result["cell"]["target"]]
        assert len(crossed) == (r["rounds"] is not None)
        assert all(n - effort.eval_every < r["rounds"] <= n == r["ran"] for n in crossed)
        could_win = {effort.budget} | {ceil(o["rounds"]) for o in result["runs"] if o["rounds"] is not None}
        assert r["ran"] in could_win if r["ended"] == "cap" else r["ran"] <= effort.budget


def test_cells_of_one_setting_share_a_run(cell, tmp_path):
    """The same setting in another table; a higher target that neither reaches; not one that was reached."""
    effort = run.Effort(budget=40, resolution=1)
    run.run_cell(cell, effort, tmp_path / "a", silent)
    for name, text in (("broken", "{"), ("list", "[]"), ("other", '{"schema": "other"}')):
        (tmp_path / "a" / f"{name}.json").write_text(text)  # none of these is a cell
    twin = run.run_cell(replace(cell, id="d", paper_rounds=7), effort, tmp_path / "b", silent)
    assert (twin["shared_with"], twin["paper_rounds"], twin["cell"]["id"]) == ("a/c.json", 7, "d")
    first = json.loads((tmp_path / "a" / "c.json").read_text(encoding="utf-8"))
    assert (twin["rounds"], twin["runs"]) == (first["rounds"], first["runs"])
    assert json.loads((tmp_path / "b" / "d.json").read_text(encoding="utf-8")) == twin
    other = run.run_cell(replace(cell, id="e", target=0.9), effort, tmp_path / "b", silent)
    assert "shared_with" not in other
    short = replace(effort, budget=1)
    low = run.run_cell(replace(cell, id="f", target=0.98), short, tmp_path / "b", silent)
    high = run.run_cell(replace(cell, id="g", target=0.99), short, tmp_path / "b", silent)
    assert low["rounds"] is high["rounds"] is None
    assert high["shared_with"] == "b/f.json"
    for which, result in (
        (replace(cell, id="f", target=0.98), low),
        (replace(cell, id="g", target=0.99), high),
    ):
        seeds.run_seed(which, result, 3, short, tmp_path / "b", silent)
        (told,) = (json.loads(p.read_text()) for p in (tmp_path / "b" / "seeds").glob(f"{which.id}+3.json"))
        assert told["cell"]["target"] == which.target


def test_a_full_gradient_is_run_once_for_all_partitions(cell, tmp_path):
    """C = 1, E = 1, B = ∞ is gradient descent on all examples, whoever holds them; nothing less is."""
    effort = run.Effort(budget=5, resolution=1)
    full = replace(cell, C=1.0, E=1, B=None, partition="iid")
    run.run_cell(full, effort, tmp_path / "a", silent)
    twin = run.run_cell(replace(full, id="d", partition="shards"), effort, tmp_path / "a", silent)
    assert (twin["shared_with"], twin["cell"]["partition"]) == ("a/c.json", "shards")
    for changes in ({"C": 0.5}, {"E": 2}, {"B": 10}):
        part = replace(full, id="e", **changes)
        run.run_cell(part, effort, tmp_path / "b", silent)
        other = run.run_cell(replace(part, id="f", partition="shards"), effort, tmp_path / "b", silent)
        assert "shared_with" not in other
        for made in (tmp_path / "b").iterdir():
            made.unlink()


def test_probe_tries_every_rate_for_some_rounds_and_runs_one(cell, tmp_path):
    result = run.run_cell(cell, run.Effort(budget=40, resolution=1, probe=3), tmp_path, silent)
    assert {r["ran"] for r in result["probes"]} == {3}
    assert result["seconds"] == pytest.approx(sum(r["seconds"] for r in result["runs"] + result["probes"]))
    assert len(result["runs"]) == 1
    best = max(result["probes"], key=lambda r: r["best"])
    assert result["lr"] == result["runs"][0]["lr"] == best["lr"]


@pytest.mark.parametrize("ended", ["diverged", "stalled"])
def test_a_probed_rate_that_fails_later_hands_over_to_the_next(ended):
    def ran(index, best, ended="cap", rounds=None):
        return search.Run(index, 10.0**index, rounds, 3, best, ended, ((3, best),), 0.1)

    probes = [ran(-2, 0.5), ran(-1, 0.7), ran(0, 0.8), ran(1, 0.9, "diverged")]
    asked = []

    def train(index):
        asked.append(index)
        return ran(index, 0.9, ended if index == 0 else "target", None if index == 0 else 20.0)

    assert [r.index for r in run._best_that_lasts(probes, train)] == asked == [0, -1]
    asked.clear()
    assert [r.index for r in run._best_that_lasts(probes[3:], train)] == asked == [1]


def test_diverged_rate_is_a_result(cell, tmp_path):
    train = run.train_at(tmp_path / "x.pt", cell, run.Effort(budget=30), 120, inf, 0.85, silent)
    assert train.ended == "diverged"
    assert train.rounds is None


def test_rate_that_stands_still_is_given_up(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PATIENCE", 5)
    still = run.train_at(tmp_path / "x.pt", cell, run.Effort(budget=60), -36, inf, 0.85, silent)
    assert (still.ended, still.rounds) == ("stalled", None)
    at = still.corners[-1][0]
    assert still.ran == at + max(5, at)
    moving = run.train_at(tmp_path / "y.pt", cell, run.Effort(budget=60), -6, inf, 0.85, silent)
    assert moving.ended != "stalled"


def test_figure_shows_the_end_of_every_curve():
    table = cells.table("table2-shakespeare")
    assert show._window(table, {}) == pytest.approx((0.39, 0.56))
    low = {"runs": [{"rounds": None, "best": 0.17, "ran": 8, "corners": [[8, 0.17]]}]}
    near = {"runs": [{"rounds": None, "best": 0.53, "ran": 8, "corners": [[8, 0.53]]}]}
    results = {"lstm-E5-B10-iid": near, "lstm-E5-B10-role": low}
    assert show._window(table, results) == pytest.approx((0.12, 0.56))


@pytest.mark.parametrize(
    ("accuracies", "lost"),
    [
        ([0.9] + [0.1] * 25, True),
        ([0.9] + [0.1] * 24, False),
        ([0.9] + [0.1] * 24 + [0.101], False),
        ([0.9] + [0.1] * 24 + [0.2], False),
        ([0.19] + [0.1] * 60, False),
        ([0.1] * 60, False),
    ],
)
def test_rate_that_fell_back_to_chance_is_given_up(accuracies, lost):
    assert run._lost(accuracies, 0.1) == lost


def test_chance_is_exactly_the_accuracy_of_naming_the_most_frequent_class():
    labels = torch.tensor([-100] * 7 + [3] * 1135 + [1] * 900 + [2] * 7965)
    assert run._most_frequent(labels) == Evaluation(7965, 10000, 0.0).accuracy
    assert run._most_frequent(labels[:1142]) == 1.0


def test_collapsed_run_ends_as_diverged(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_lost", lambda curve, chance: len(curve) >= 3 and 0 < chance < 0.5)
    gone = run.train_at(tmp_path / "x.pt", cell, run.Effort(budget=30), -6, inf, 0.99, silent)
    assert (gone.ended, gone.ran, gone.rounds) == ("diverged", 3, None)


def test_printed_table_says_what_was_not_run_and_who_is_near(tmp_path):
    table = cells.table("table1-2nn")

    def ran(rounds):
        corners = [[1, 0.5], [80, 0.97]]
        return {"rounds": rounds, "best": 0.97, "ran": rounds or 90, "effort": {}, "corners": corners}

    def result(rounds, interior=True, seeds=(), budget=9999, data="mnist-centred", buffer=None):
        return {
            "cell": {"data": data} | ({} if buffer is None else {"buffer": buffer}),
            **{
                "rounds": rounds,
                "interior": interior,
                "probes": [],
                "note": "",
                "effort": {"budget": budget},
            },
            **{"runs": [ran(rounds)], "seeds": [ran(r) for r in seeds]},
        }

    results = {
        "2nn-C0.0-B10-iid": result(300.4),
        "2nn-C0.1-B10-iid": result(60.0, interior=False),
        "2nn-C0.5-Binf-iid": result(None),
        "2nn-C0.2-B10-noniid": result(None),
        "2nn-C0.2-B10-iid": result(None, budget=116),
        "2nn-C0.2-Binf-iid": result(None, budget=1658),
        "2nn-C0.0-Binf-iid": result(1400.0, budget=1450, data="mnist"),
        "2nn-C0.0-B10-noniid": result(2000.0, seeds=(4000.0, 1000.0), buffer=100),
        "2nn-C0.1-B10-noniid": result(500.0, seeds=(None, 2000.0)),
        "2nn-C1.0-B10-iid": result(70.0, seeds=(None, 70.0)),
    }
    results["2nn-C0.1-B10-noniid"]["seeds"][0]["ran"] = 3000
    text = show.render(table, results)
    assert "300 | 316" in text
    assert "60* (5.0×) | 87 (3.6×)" in text
    assert "— | —" in text
    assert "not run | 1474 (1.0×)" in text
    assert "2000 [357, 11190] | 3275" in text
    assert ">1442 (<1.4×) | 664 (4.9×)" in text
    assert "10 of 20 cells run, 3 undecided; 3 (43%) within 1.5x of the paper's rounds." in text
    assert "2nn-C0.1-B10-noniid: more than 1442 rounds (2 of 3 seeds reached it), paper 664." in text
    assert "2nn-C1.0-B10-iid: more than 76 rounds (2 of 3 seeds reached it), paper 70." in text
    assert "Undecided: a budget or a seed ended before" in text
    assert "[low, high]: the geometric mean" in text
    assert "2nn-C0.2-B10-noniid: not reached in 9999 rounds, 97.0% at best, paper 619." in text
    assert "2nn-C0.2-Binf-iid: not reached in 1658 rounds, 97.0% at best, paper 1658." in text
    assert "Trained on mnist, not mnist-centred: 2nn-C0.0-Binf-iid." in text
    assert "Shuffled through a buffer of 100: 2nn-C0.0-B10-noniid." in text
    assert text.count("Trained on") == text.count("Shuffled through") == 1
    assert "1602.05629" in text
    diverged = {"rounds": None, "best": 0.0, "ran": 0, "effort": {}, "corners": []}
    results["2nn-C0.0-B10-iid"]["seeds"].append(diverged)
    text = show.render(table, results)
    assert ">300 | 316" in text
    assert "60* (>5.0×) | 87 (3.6×)" in text
    assert ">76 | 70 (4.5×)" in text
    show.draw(table, results, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 20_000


def test_estimate_is_the_mean_of_logarithms_and_a_bound_where_a_seed_fell_short():
    """A closed form: the logarithms of 100, 200, 400 have mean log 200 and deviation log 2."""

    def of(*rounds, after=40):
        return seeds.Estimate.of([{"rounds": n, "ran": after} for n in rounds])

    found = of(100.0, 200.0, 400.0)
    factor = 2 ** (4.302652729696142 / 3**0.5)
    assert (found.mean, found.ci95) == (
        pytest.approx(200),
        (pytest.approx(200 / factor), pytest.approx(200 * factor)),
    )
    assert not found.bound
    assert of(19.5) == seeds.Estimate(19.5, None, 1, 1)
    assert of(None, 10.0) == seeds.Estimate(pytest.approx(20), None, 1, 2)
    assert of(None, 10.0).bound
    assert of(None, 10.0, after=0) == seeds.Estimate(pytest.approx(10), None, 1, 2)
    assert of(None, 10.0, None) == seeds.Estimate(None, None, 1, 3)
    assert of(None) == seeds.Estimate(None, None, 0, 1)


def test_other_seeds_are_kept_beside_the_cell_and_its_twins_read_them(cell, tmp_path, monkeypatch):
    effort = run.Effort(budget=40, resolution=1, start_lr=0.01)
    first = run.run_cell(cell, effort, tmp_path / "a", silent)
    for seed in (12, 7):
        seeds.run_seed(cell, first, seed, run.Effort(), tmp_path / "a", silent)
    names = sorted(p.name for p in (tmp_path / "a" / "seeds").iterdir())
    assert names == ["c+12.json", "c+7.json"]
    kept = json.loads((tmp_path / "a" / "seeds" / "c+7.json").read_text(encoding="utf-8"))
    assert (kept["effort"]["seed"], kept["run"]["lr"], kept["cell"]) == (7, first["lr"], first["cell"])
    assert "command" in kept
    assert "versions" in kept
    alone = run.train_at(tmp_path / "x.pt", cell, replace(effort, seed=7), 0, inf, 0.85, silent)
    slower = {**first, "lr": 0.1}
    told = run.Effort(precision="bf16")
    seeds.run_seed(replace(cell, id="e"), slower, 7, told, tmp_path / "a", silent)
    assert seeds.read_seeds(tmp_path / "a", "e", slower)[0]["lr"] == pytest.approx(0.1)
    assert seeds.read_seeds(tmp_path / "a", "e", slower)[0]["effort"]["precision"] == "bf16"
    at_seven, at_twelve = seeds.read_seeds(tmp_path / "a", "c", first)
    assert (first["lr"], at_seven["rounds"]) == (1.0, alone.rounds)
    assert at_twelve["rounds"] != at_seven["rounds"]

    monkeypatch.setattr(seeds, "train_at", None)  # neither a kept seed nor a twin's is trained again
    seeds.run_seed(cell, first, 7, run.Effort(), tmp_path / "a", silent)
    twin = run.run_cell(replace(cell, id="d"), effort, tmp_path / "b", silent)
    seeds.run_seed(replace(cell, id="d"), twin, 12, run.Effort(), tmp_path / "b", silent)
    assert seeds.read_seeds(tmp_path / "b", "d", twin) == [at_seven, at_twelve]


def test_command_runs_the_next_seeds(cell, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells, "table", lambda name: cells.Table(name, "Title", "", (cell,)))
    options = TableOptions(seed=4, seeds=3, start_lr=0.01, resolution=1, budget=40, out=str(tmp_path))
    run_table("easy", options)
    assert sorted(p.name for p in (tmp_path / "seeds").iterdir()) == ["c+5.json", "c+6.json"]
    assert "] | 20" in capsys.readouterr().out
    with pytest.raises(InputError, match="seeds must be >= 1, got 0"):
        run_table("easy", replace(options, seeds=0))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("nosuch", {}, "unknown table 'nosuch'"),
        ("../escaped", {}, r"unknown table '\.\./escaped'"),
        ("table3", {"cell": ("2nn",)}, "cells must match"),
        ("table3", {"start_lr": inf}, "start_lr must be between 1e-9 and 1e9, got inf"),
        ("figure1", {"data": "digits"}, "data must be left out for figure1, got 'digits'"),
        ("figure1", {"cell": ("x",)}, "cell must be left out for figure1"),
    ],
)
def test_command_makes_no_folder_for_what_it_refuses(tmp_path, monkeypatch, name, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run_table(name, TableOptions(**flags))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["table3", "figure1"])
def test_showing_makes_no_folder(tmp_path, capsys, name):
    run_table(name, TableOptions(show=True, out=str(tmp_path / "no")))
    assert "not run" in capsys.readouterr().out
    assert not (tmp_path / "no").exists()


def test_command_trains_with_another_order_of_examples(cell, tmp_path, monkeypatch, capsys):
    by_label = replace(cell, partition="shards", buffer=2)
    monkeypatch.setattr(cells, "table", lambda name: cells.Table(name, "Title", "", (by_label,)))
    found = {}
    for buffer in (None, 0, 1):
        out = tmp_path / str(buffer)
        options = TableOptions(buffer=buffer, probe=2, start_lr=0.01, resolution=1, budget=4, out=str(out))
        run_table("easy", options)
        found[buffer] = json.loads((out / "c.json").read_text(encoding="utf-8"))
    assert [found[b]["cell"]["buffer"] for b in (None, 0, 1)] == [2, None, 1]
    assert len({str([p["corners"] for p in found[b]["probes"]]) for b in found}) == 3
    with pytest.raises(InputError, match="buffer must be >= 0, got -1"):
        run_table("easy", replace(options, buffer=-1))


def test_command_trains_in_the_precision_it_is_told_and_the_table_says_which(
    cell, tmp_path, monkeypatch, capsys
):
    convolutions = replace(cell, model="cnn", B=None)
    monkeypatch.setattr(cells, "table", lambda name: cells.Table(name, "Title", "", (convolutions,)))
    found = []
    for precision in ("float32", "bf16"):
        options = TableOptions(precision=precision, resolution=1, budget=3, out=str(tmp_path / precision))
        run_table("easy", options)
        found.append(json.loads((tmp_path / precision / "c.json").read_text(encoding="utf-8")))
        assert ("in bfloat16, of a seed at least: c." in capsys.readouterr().out) == (precision == "bf16")
    assert [f["effort"]["precision"] for f in found] == ["float32", "bf16"]
    assert found[0]["runs"] != found[1]["runs"]
    with pytest.raises(InputError, match="precision must be one of"):
        run_table("easy", replace(options, precision="fp16"))


def test_a_twin_of_another_precision_is_another_run(cell, tmp_path):
    effort = run.Effort(budget=5, resolution=1)
    first = run.run_cell(cell, effort, tmp_path / "a", silent)
    path = tmp_path / "a" / "c.json"
    del first["effort"]["precision"]  # as older results have it
    path.write_text(json.dumps(first), encoding="utf-8")
    for precision, shared in (("float32", True), ("bf16", False)):
        told = replace(effort, precision=precision)
        twin = run.run_cell(replace(cell, id=precision), told, tmp_path / "b", silent)
        assert ("shared_with" in twin) == shared


@pytest.mark.parametrize("twin", [False, True])
def test_killed_seed_goes_on_to_the_same_result_in_its_own_table_or_a_twins(
    cell, tmp_path, monkeypatch, twin
):
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    cell = replace(cell, target=0.97)
    first = run.run_cell(cell, run.Effort(budget=40, resolution=1), tmp_path, silent)
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    seeds.run_seed(cell, first, 3, run.Effort(), tmp_path / "whole", silent)

    def killed(what, number, *args):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seeds.run_seed(cell, first, 3, run.Effort(), tmp_path / "cut", killed)
    (checkpoint,) = (tmp_path / "cut" / "seeds").iterdir()
    assert checkpoint.name == "c+3.pt"
    torch.save(torch.load(checkpoint) | {"seconds": 1000.0}, checkpoint)
    numbers = []
    goes_on, result = (
        (replace(cell, id="d"), first | {"shared_with": "cut/c.json"}) if twin else (cell, first)
    )
    write_json(tmp_path / "cut" / "c.json", first)
    folder = tmp_path / ("beside" if twin else "cut")
    seeds.run_seed(goes_on, result, 3, run.Effort(), folder, lambda what, n, *args: numbers.append(n))
    (whole,), (cut,) = (seeds.read_seeds(tmp_path / f, "c", first) for f in ("whole", "cut"))
    assert numbers[0] == 2
    assert cut | {"seconds": 0} == whole | {"seconds": 0}
    assert cut["seconds"] > 1000 > whole["seconds"] > 0


def test_figure_1_shows_that_a_shared_start_makes_averaging_work():
    result = figure1.compute(easy_data_as_mnist(), 0, "cpu", repeats=2)
    apart, shared = (np.mean(figure1.middle(result, case)) for case in figure1.CASES)
    assert apart > 0.05
    assert shared < apart / 2
    ends = np.array(result["losses"][figure1.CASES[1]])
    assert ends.shape == (2, 50)
    assert result["thetas"][0] == -0.2
    assert result["thetas"][-1] == 1.2


def easy_data_as_mnist():
    """1,797 real digits instead of MNIST, split in two parts of 600 by the figure itself."""
    from fltoolkit.data import load

    return load("digits")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cells.table("table9"), "unknown table 'table9'"),
        (lambda: cells.table("table3").only(["2nn"]), "cells must match one of sgd-0.8"),
    ],
)
def test_unknown_names_list_the_known(call, message):
    with pytest.raises(InputError, match=message):
        call()
