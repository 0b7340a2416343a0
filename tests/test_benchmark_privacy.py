"""The benchmarks of what defenses cost: accuracy under differential privacy, and leak beside cost."""

from __future__ import annotations

import json
import sys
from math import inf
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import defense_tradeoff as tradeoff
import dp_accuracy as dp
import dpsgd_speed as speed

from fltoolkit.accounting import gaussian_epsilon
from fltoolkit.metrics.interval import mean_interval


def trained(method, epsilon, folder, population=100):
    """Three seeds on digits, and the interval of their accuracy."""
    cells = [dp.Cell("digits", method, epsilon, seed, population) for seed in dp.SEEDS]
    runs = [dp.run(cell, folder / cell.name) for cell in cells]
    return runs, mean_interval([r["accuracy"] for r in runs])


def test_dp_sgd_learns_digits_at_epsilon_one(tmp_path):
    """1,437 images and softmax regression: about 91 %, and 92 % without noise."""
    runs, found = trained("dp-sgd", 1.0, tmp_path)
    assert found["mean"] > 0.87, found
    for r in runs:
        spent = r["reported"]["example"]
        assert (spent["unit"], spent["adjacency"]) == ("example", "add-remove")
        assert 0.99 < spent["aggregate"] <= 1.0
        assert r["reported"]["aggregate"] is None, "a client is not protected"
        steps = 30 * -(-1437 // 256)
        assert gaussian_epsilon(r["noise_multiplier"], 256 / 1437, steps, 1e-5) == pytest.approx(
            spent["aggregate"], rel=2e-3
        )


def test_dp_fedavg_needs_many_clients(tmp_path):
    """The same ε for 100 clients and for 10,000, whose mean has a hundredth of the noise."""
    runs, few = trained("dp-fedavg", 0.5, tmp_path)
    scaled, many = trained("dp-fedavg", 0.5, tmp_path, 10_000)
    assert few["ci95"][1] < 0.6
    assert many["ci95"][0] > 0.8
    assert all(0.49 < r["reported"]["aggregate"] <= 0.5 for r in runs)
    assert runs[0]["noise_multiplier"] == pytest.approx(100 * scaled[0]["noise_multiplier"], rel=1e-4)


def test_accuracy_cells_are_kept_shown_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dp, "SEEDS", (0, 1))
    monkeypatch.setattr(dp, "EPSILONS", (2.0, inf))
    monkeypatch.setitem(
        dp.SETTINGS,
        ("digits", "dp-sgd"),
        dp.Setting("--data digits --model softmax --clients 1 --fraction 1 --batch inf --lr 1", 5, 0.5),
    )
    arguments = ["digits", "--only", "dp-sgd", "--out", str(tmp_path / "new")]
    assert dp.main(arguments) == 0
    path = tmp_path / "new" / "digits.json"
    kept = json.loads(path.read_text())
    assert [(r["epsilon"], r["seed"]) for r in kept] == [(2.0, 0), (None, 0), (2.0, 1), (None, 1)]
    text = capsys.readouterr().out
    mean = 50 * (kept[0]["accuracy"] + kept[2]["accuracy"])
    assert f" {mean:.1f} ±" in text
    assert text.count("not run") == 0
    assert Image.open(path.with_suffix(".png")).size[0] > 500
    path.write_text(json.dumps([kept[0] | {"accuracy": 0.5}, *kept[1:]]))
    assert dp.main(arguments) == 0
    assert json.loads(path.read_text())[0]["accuracy"] == 0.5, "what has been run is not run again"
    assert dp.main(["digits", "--show", "--out", str(tmp_path / "none")]) == 1


def test_every_accuracy_cell_can_be_trained():
    """Names are unique, and every command is one that `train` takes."""
    for data in ("digits", "mnist"):
        cells = dp.cells(data)
        assert len({c.name for c in cells}) == len(cells) == 3 * (7 + 4 * 6 + 1)
    cell = dp.Cell("mnist", "dp-sgd", 2.93, 1)
    assert "--epsilon 2.93" in " ".join(cell.flags)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tradeoff, "SEEDS", (0, 1))
    monkeypatch.setattr(tradeoff, "ATTACKS", ("idlg:adapt=true,steps=40,restarts=1", "features:steps=5"))
    short = "train --data digits --model softmax --clients 4 --fraction 1 --lr 0.3 --rounds 2 --eval-every 2"
    monkeypatch.setattr(tradeoff, "TRAIN", short)
    monkeypatch.setattr(tradeoff, "AUDIT", "--data digits --model tanhcnn --batch 1 --victims 2")
    curves = [c for c in tradeoff.CURVES if c.name == "none"]
    monkeypatch.setattr(
        tradeoff, "CURVES", (*curves, tradeoff.Curve("clip", tradeoff.each("clip:norm={}", (1, 0.01))))
    )


def test_leak_beside_cost(small, tmp_path, capsys):
    path = tmp_path / "tradeoff.json"
    assert tradeoff.main(["--out", str(path)]) == 0
    kept = json.loads(path.read_text())
    assert [(r["curve"], r["strength"]) for r in kept] == [("none", 0), ("clip", 0), ("clip", 1)]
    for r in kept:
        ran = {a: sum(min(40, d) for d in v["psnr_db"]["values"]) for a, v in r["attacks"].items()}
        assert r["commands"][1].startswith(f"python -m fltoolkit audit --attack {max(ran, key=ran.get)} ")
        assert len(r["accuracy"]["values"]) == 2
    assert kept[2]["accuracy"]["mean"] < kept[0]["accuracy"]["mean"], "hardly anything was learned"
    assert kept[2]["attacks"][tradeoff.ATTACKS[0]]["adaptation"].startswith("distance blind to scale")
    assert "clip:norm=0.01" in capsys.readouterr().out
    assert Image.open(path.with_suffix(".png")).size[0] > 500
    before = path.read_bytes()
    assert tradeoff.main(["--out", str(path)]) == 0
    assert path.read_bytes() == before


def test_an_attack_that_is_refused_is_told(small, monkeypatch):
    monkeypatch.setattr(tradeoff, "ATTACKS", (*tradeoff.ATTACKS[:1], "inverting:tv=nothing"))
    found = tradeoff.measure(tradeoff.CURVES[0], 0)
    assert "tv" in found["attacks"]["inverting:tv=nothing"]["refused"]
    assert tradeoff.strongest(found["attacks"]) == tradeoff.ATTACKS[0]


def test_every_defense_there_is_has_a_curve():
    from fltoolkit.registry import defense_names

    named = {s.partition(":")[0] for c in tradeoff.CURVES for specs in c.strengths for s in specs}
    assert named | tradeoff.SAME_SUM == set(defense_names())
    assert not named & tradeoff.SAME_SUM
    drawn = {name for names in tradeoff.FAMILIES.values() for name in names}
    assert drawn == {c.name for c in tradeoff.CURVES}
    assert all(len(c.strengths) == 3 for c in tradeoff.CURVES if not c.name.startswith("none"))


def test_the_documentation_shows_the_committed_results():
    text = (Path(__file__).parents[1] / "docs" / "defenses.md").read_text(encoding="utf-8")
    for data in ("digits", "mnist"):
        results = json.loads((dp.HERE / f"{data}.json").read_text(encoding="utf-8"))
        assert dp.show(dp.gathered(results)) in text
    assert tradeoff.show(json.loads(tradeoff.HERE.read_text(encoding="utf-8"))) in text
    speeds = Path(__file__).parents[1] / "benchmarks" / "results" / "dpsgd_speed.json"
    assert speed.render(json.loads(speeds.read_text(encoding="utf-8"))) in text


def test_the_committed_results_keep_what_was_aimed_at():
    """On MNIST 95.5 % at ε = 1 by DP-SGD, and no less than 98 % at ε = 2.93."""
    rows = dp.gathered(json.loads((dp.HERE / "mnist.json").read_text(encoding="utf-8")))
    reached = {r["epsilon"]: r["mean"] for r in rows if r["method"] == "dp-sgd"}
    assert reached[2.93] >= 0.98
    assert reached[1.0] >= 0.955
