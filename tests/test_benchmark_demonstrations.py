"""The demonstrations of the papers' claims: a small one from end to end, and what the documentation shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from fltoolkit.types import LocalSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import demonstrations as demos

SMALL = demos.Demonstration(
    "small",
    "nobody",
    "Fifty iterations bring back more of a digit than one does.",
    "Digits.",
    {"fifty": "idlg:steps=50,restarts=1", "one": "idlg:steps=1,restarts=1"},
    "digits",
    "mlp",
    local=LocalSpec(1, None, 0.1),
    victims=3,
)


def test_every_side_sees_the_same_victims_and_what_it_found_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demos, "DEMONSTRATIONS", (SMALL,))
    demos.main(["--out", str(tmp_path), "--only", "small"])
    found = json.loads((tmp_path / "small.json").read_text("utf-8"))
    ours, weak = (found["sides"][s] for s in ("fifty", "one"))
    assert ours["metrics"]["psnr_db"]["mean"] > weak["metrics"]["psnr_db"]["mean"] + 5
    assert (ours["victims"], ours["images"]) == (3, 3)
    # The best guess without any update is the same, as the images are.
    floors = [s["metrics"]["psnr_db"]["mean"] - s["metrics"]["psnr_gain_db"]["mean"] for s in (ours, weak)]
    assert floors[0] == pytest.approx(floors[1], abs=1e-3)
    behind = found["behind_first_db"]["one"]
    means = [s["metrics"]["psnr_db"]["mean"] for s in (ours, weak)]
    assert behind["mean"] == pytest.approx(means[0] - means[1], abs=1e-3)
    low, high = behind["ci95"]
    assert 0 < low < behind["mean"] < high
    assert "--only small --seed 0" in found["command"]
    assert Image.open(tmp_path / "small.png").size[0] > 200
    shown = capsys.readouterr().out
    assert "fifty" in shown
    assert f"{ours['metrics']['psnr_db']['mean']:.1f}" in shown
    kept = (tmp_path / "small.json").stat().st_mtime_ns
    demos.main(["--out", str(tmp_path)])
    assert (tmp_path / "small.json").stat().st_mtime_ns == kept


def test_an_unknown_demonstration_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demos.main(["--out", str(tmp_path), "--only", "dlgg"])
    assert "dlgg" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_documentation_shows_the_committed_results():
    text = (Path(__file__).parents[1] / "docs" / "demonstrations.md").read_text("utf-8")
    done = demos.read(demos.RESULTS)
    assert demos.render(done).rstrip() in text
    assert [d["demonstration"]["name"] for d in done] == [d.name for d in demos.DEMONSTRATIONS]
    for d in demos.DEMONSTRATIONS:
        assert f"results/demonstrations/{d.name}.png" in text
        assert d.paper in text
        assert d.claim[1:] in text
