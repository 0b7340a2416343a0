"""The speed benchmark's parts: whom it attacks, what it counts, what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import inversion_speed as speed
from inversion_rival import FEDAVG, SMOOTH, images, ours

from fltoolkit.data import load
from fltoolkit.inversion.matching import Objective

OPTIONS = argparse.Namespace(victims=2, seed=3, repeats=2, model="lenet")


def test_victims_in_order_are_the_first_images_with_labels():
    data = images("photos")
    seen = speed.in_order(data, "lenet", OPTIONS)
    for v, (o, truth) in enumerate(seen):
        assert torch.equal(truth.x[0], data.train.x[v])
        assert o.labels.tolist() == [int(data.train.y[v])]
    assert not torch.equal(seen[0][0].params, seen[1][0].params)


def test_a_search_is_scored_and_counted():
    data = load("photos")
    victims = speed.seen_by("idlg", data, "lenet", OPTIONS)
    assert all(o.labels is None for o, _ in victims)
    found = speed.search("idlg:restarts=1", victims, data, 0, steps=60)
    longer = speed.search("idlg:restarts=1", victims, data, 0, steps=200)
    assert found["evaluations"] >= 60
    assert longer["psnr_db"]["mean"] > found["psnr_db"]["mean"]
    assert 0 < found["seconds_a_victim"] <= found["seconds_with_compilation"]


def test_each_way_and_the_floor_are_timed_as_often():
    victims = speed.seen_by("idlg", load("photos"), "lenet", OPTIONS)
    times = speed.per_evaluation(victims, Objective(), 2)
    assert {name: len(t) for name, t in times.items()} == {"floor": 2, "ours": 2, "ours, bf16": 2}


def test_the_table_sets_costs_over_the_floor():
    side = {
        "psnr_db": {"mean": 31.0, "ci95": [30.0, 32.0], "values": [30.0, 31.0, 31.0, 32.0]},
        "above_30_db": {"value": 0.5},
        "seconds_a_victim": 1.5,
        "evaluations": 300.0,
    }
    case = {"victims": 2, "sides": {"ours": side}, "milliseconds": {"floor": [2.0], "ours": [3.0, 5.0, 4.0]}}
    text = speed.render({"lenet": case | {"time_saved": {"idlg": 0.25}}})
    assert "31.0 ±1.0" in text
    assert "ours 4.00 (2.0x)" in text
    assert "idlg: 25%" in text


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="victims must be >= 1, got 0"):
        speed.main(["--victims", "0", "--out", str(tmp_path / "x.json")])


@pytest.mark.parametrize("spec", [SMOOTH, speed.BETTER, "features"])
def test_ours_beside_a_rival_keeps_to_its_evaluations(spec):
    (o, _), *_ = speed.in_order(images("photos"), "lenet", OPTIONS)
    assert 48 <= ours(spec, o, 50, 0, 0).iterations <= 53


def test_fedavg_is_told_no_labels():
    options = argparse.Namespace(victims=1, seed=0, data="photos", model="lenet", iterations=150)
    case = speed.fedavg(options)
    assert 140 <= case["sides"]["ours"]["evaluations"] <= 165
    (o, truth), *_ = speed.in_order(images("photos"), "lenet", options, 4, FEDAVG)
    assert (o.local_steps, len(truth)) == (4, 4)
    assert speed.named("convnet", "convnet16") == "convnet16"
    assert speed.named("fedavg", "convnet16") == "fedavg"


def test_the_documentation_shows_the_committed_figures():
    text = (Path(__file__).parents[1] / "docs" / "inversion.md").read_text(encoding="utf-8")
    assert speed.render(json.loads(speed.RESULT.read_text(encoding="utf-8"))) in text
