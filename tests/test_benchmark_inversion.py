"""The inversion benchmark's grid, its resumable cells, its table and its figure."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import inversion
import inversion_cells
import inversion_rival
from inversion_cells import Cell, cells, dataset
from inversion_figure import draw, read, render, strongest

ONLY = "2nn-trained-n4-1step-idlg"


def test_every_cell_has_an_id_of_its_own_and_the_cheap_come_first():
    every = cells()
    assert len({c.id for c in every}) == len(every)
    assert [c.cost for c in every] == sorted(c.cost for c in every)
    assert {c.model for c in every} == {"lenet", "2nn", "cnn", "convnet", "resnet18"}
    assert all(c.victims >= 4 and c.victims * c.batch >= c.target.images for c in every)


def test_the_grid_leaves_out_what_cannot_work():
    every = cells()
    assert all(c.batch >= 4 for c in every if c.local == "epoch")
    assert all(c.local == "1step" for c in every if c.attack == "idlg")
    large = [c for c in every if c.model in ("convnet", "resnet18")]
    assert {(c.batch, c.local, c.attack) for c in large} == {
        (1, "1step", "inverting"),
        (4, "1step", "inverting"),
    }
    assert {c.attack for c in cells(("gradinversion",))} == {"gradinversion"}
    assert {c.model for c in every if c.attack == "natural"} == {"lenet", "cnn"}
    assert {c.local for c in cells(("idlg:simulate=true",))} == {"1step", "5steps", "epoch"}
    assert {c.local for c in cells(("idlg:simulate=false",))} == {"1step"}


def test_options_in_an_attacks_name_count_and_the_flag_counts_more():
    def steps(attack: str, flag: int | None = None) -> int:
        return Cell("cnn", "trained", 4, "1step", attack).make(flag).steps

    budget = inversion_cells.TARGETS["cnn"].iterations
    assert steps("inverting") == budget["inverting"]
    assert (steps("inverting:steps=7"), steps("inverting:steps=7", 9)) == (7, 9)
    assert Cell("cnn", "trained", 4, "1step", "idlg:restarts=3").make(None).restarts == 3


@pytest.mark.parametrize(("local", "steps"), [("1step", 1), ("5steps", 5), ("epoch", 4)])
@pytest.mark.parametrize("batch", [4, 8, 16])
def test_the_clients_take_the_steps_that_the_cell_says(local, steps, batch):
    assert Cell("2nn", "trained", batch, local, "inverting").recipe.steps(batch) == steps


def test_victims_are_not_trained_on():
    data, public = dataset("digits")
    assert len(data.train) + len(public) == 1437
    seen = {x.numpy().tobytes() for x in public.x}
    shared = sum(x.numpy().tobytes() in seen for x in data.train.x)
    assert shared < 5, "only images that the data set itself holds twice"


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Models are hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion_cells, "TESTED", 100)
        patch.setitem(inversion_cells.TARGETS, "2nn", replace(inversion_cells.TARGETS["2nn"], steps=60))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two cells on digits, run through the command line."""
    folder = tmp_path_factory.mktemp("inversion")
    go(folder, "--only", ONLY)
    go(folder, "--only", "2nn-untrained-n4-epoch")
    return folder


def go(folder: Path, *flags: str) -> None:
    small = ("--data", "digits", "--iterations", "30", "--victims", "2")
    inversion.main([*small, "--out", str(folder / "cells"), "--weights", str(folder / "weights"), *flags])


def test_a_cell_is_written_whole(done):
    path = done / "cells" / f"{ONLY}.json"
    assert path.stat().st_size < 4096
    found = json.loads(path.read_text())
    assert found["cell"]["id"] == ONLY
    assert found["cell"]["recipe"]["steps"] == 1
    assert found["iterations"]["most"] == found["attack_options"]["steps"] == 30
    assert (found["victims"], found["images"], found["data"], found["seed"]) == (2, 8, "digits", 0)
    assert found["test_accuracy"] > 0.8
    for name in ("psnr_db", "psnr_gain_db", "ssim", "mse", "label_accuracy"):
        low, high = found["metrics"][name]["ci95"]
        assert low <= found["metrics"][name]["mean"] <= high
    assert found["command"].endswith(f"--only {ONLY} --seed 0 --iterations 30 --victims 2 --data digits")
    assert {p.stem for p in (done / "cells").iterdir()} == {ONLY, "2nn-untrained-n4-epoch-inverting"}


def test_a_finished_cell_is_not_run_again_unless_asked(done, monkeypatch):
    ran = []
    monkeypatch.setattr(inversion, "run_cell", lambda cell, *_: ran.append(cell.id) or {"metrics": PSNR})
    go(done, "--only", ONLY)
    assert ran == []
    go(done, "--only", ONLY, "--redo")
    assert ran == [ONLY]


PSNR = {"psnr_db": {"mean": 1.0}}


def test_the_same_seed_gives_the_same_numbers_from_kept_weights(done, tmp_path):
    before = json.loads((done / "cells" / f"{ONLY}.json").read_text())
    go(done, "--only", ONLY, "--out", str(tmp_path / "cells"))
    after = json.loads((tmp_path / "cells" / f"{ONLY}.json").read_text())
    assert after["metrics"]["psnr_db"]["mean"] == pytest.approx(before["metrics"]["psnr_db"]["mean"], abs=0.1)


def test_the_table_says_what_was_not_run(done, capsys):
    go(done, "--show", "--only", "2nn")
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["2nn, untrained, 1 step"].count("not run") == 4
    assert lines["2nn, trained, 1 step"].count("not run") == 3
    assert lines["2nn, untrained, epoch of 4 steps"].count("not run") == 2
    assert "idlg" in lines["2nn, trained, 1 step"]
    assert render({}).count("not run") == sum(1 for c in cells() if c.attack == "inverting")


def test_the_figure_is_drawn(done, tmp_path):
    draw(read(done / "cells"), tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 500


def test_the_strongest_attack_of_a_setting_is_shown(done):
    found = dict(read(done / "cells"))
    weak = json.loads(json.dumps(found[ONLY]))
    weak["cell"]["attack"], weak["metrics"]["success"]["value"] = "dlg", -inf
    best = strongest({"weak": weak, **found})
    assert {r["cell"]["attack"] for r in best.values()} == {"idlg", "inverting"}


def test_the_interval_of_the_success_rate_is_over_victims():
    """Images of a victim that all share its fate count once; independent ones count each."""
    same = inversion.success([torch.tensor([True] * 4), torch.tensor([False] * 4)] * 5)
    assert same["value"] == 0.5
    assert same["effective_images"] == pytest.approx(10)
    assert same["ci95"] == pytest.approx([0.187, 0.813], abs=1e-3)
    single = inversion.success([torch.tensor([i < 3]) for i in range(30)])
    assert single["ci95"] == pytest.approx([0.0211, 0.2653], abs=1e-3)
    never = inversion.success([torch.zeros(4, dtype=torch.bool)] * 5)
    assert never["ci95"] == pytest.approx([0.0, 0.5218], abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "vgg"], "only must be part of a cell's id"),
        (["--victims", "0"], "victims must be >= 1, got 0"),
        (["--attack", "idgl"], "did you mean 'idlg'"),
    ],
)
def test_bad_flags_are_refused(flags, words, tmp_path):
    with pytest.raises(SystemExit, match=words):
        inversion.main([*flags, "--data", "digits", "--out", str(tmp_path), "--weights", str(tmp_path)])


def test_the_rivals_victims_come_with_labels_in_the_order_of_their_steps():
    """The client's update is that of its steps on the images in the order in which the labels are told."""
    case = next(c for c in inversion_rival.CASES if c.name == "lenet-n4-fedavg")
    data = inversion_rival.images("photos")
    scene = inversion_rival.Scene(model=case.model, data=data, batch=4, local=case.local, frozen_norm=True)
    stage = inversion_rival.Stage(scene)
    played = (inversion_rival.told(stage, v) for v in range(10))
    victim, (seen, truth) = next((v, p) for v, p in enumerate(played) if len(p[1].y.unique()) == 4)
    order = [truth.y.tolist().index(y) for y in seen.labels.tolist()]
    model = stage.model(victim)
    optimiser = torch.optim.SGD(model.parameters(), lr=case.local.lr)
    for i in order:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(truth.x[i : i + 1]), truth.y[i : i + 1]).backward()
        optimiser.step()
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.allclose(seen.layout.row(model) - seen.params, seen.update, atol=1e-5)


def test_the_rivals_are_compared_victim_by_victim():
    one = {"psnr_db": [10.0, 20.0], "ssim": [0.1, 0.3], "iterations": 5, "seconds": 2.0}
    low = {**one, "psnr_db": [10.0, 10.0], "seconds": 4.0}
    victim = {"ours": one, "breaching": low, "ours, equal time": one}
    found = inversion_rival.summarise([victim, victim])
    assert found["minus_breaching_db"]["ours"]["mean"] == 5.0
    assert found["seconds_ours_to_breaching"] == [0.5, 0.5]
    assert found["sides"]["ours"]["psnr_db_by_image"] == [[10.0, 20.0]] * 2
    assert inversion_rival.render({"lenet-n1": found}).count("not run") == 6 * 8


def test_the_documentation_shows_the_committed_cells():
    text = (Path(__file__).parents[1] / "docs" / "inversion.md").read_text(encoding="utf-8")
    assert render(read(inversion.RESULTS)) in text
    found = json.loads(inversion_rival.RESULT.read_text(encoding="utf-8"))
    assert inversion_rival.render(found["cases"]) in text
