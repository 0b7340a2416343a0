"""The benchmarks of secure sums: that they count what they say, and draw what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cohort_leak as leak
import secagg_speed as speed

from fltoolkit.secagg import bonawitz_client, bonawitz_server


@pytest.mark.parametrize(
    "flags",
    [
        ["--clients", "6", "--dropouts", "1"],
        ["--clients", "9", "--dropouts", "2", "--graph", "regular", "--degree", "6", "--threshold", "0.5"],
        ["--clients", "6", "--malicious", "--bits", "20"],
    ],
)
def test_a_session_makes_as_many_masks_as_the_arithmetic_is_charged_for(flags, monkeypatch, capsys):
    made = []
    for module in (bonawitz_client, bonawitz_server):
        real = module.add_mask
        monkeypatch.setattr(module, "add_mask", lambda *a, f=real, **k: (made.append(1), f(*a, **k)))
    assert speed.main([*flags, "--dim", "500", "--floor", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["session"]["masks"] == len(made)
    assert result["session"]["arithmetic_seconds"] > 0
    assert result["session"]["survivors"] == int(flags[1]) - (int(flags[3]) if "--dropouts" in flags else 0)
    rounds = [r["round"] for r in result["session"]["rounds"]]
    assert ("consistency check" in rounds) == ("--malicious" in flags)
    assert result["session"]["rounds"][2]["client_sends"] > 500 * result["options"]["bits"] / 8
    assert result["paper_expansion"] == pytest.approx(1.734, abs=1e-3)


def test_the_table_of_a_session_is_printed_and_written(tmp_path, capsys):
    out = tmp_path / "speed.json"
    assert speed.main(["--clients", "4", "--dim", "100", "--floor", "0", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "masked input" in text
    assert "by the paper's formula" in text
    result = json.loads(out.read_text())
    assert result["options"]["clients"] == 4
    result["session"] |= {"seconds": 3.0, "arithmetic_seconds": 2.0}
    result["primitives"] = [{"part": "mask and add", "ours": 0.001, "flower": 0.01}]
    out.write_text(json.dumps(result))
    assert speed.main(["--show", str(out), str(out)]) == 0
    text = capsys.readouterr().out
    assert "1.50" in text
    assert text.count("10.0x") == 1


def test_a_wrong_sum_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(bonawitz_server.Server, "_own_mask", lambda self, c: (bytes(16), True))
    with pytest.raises(SystemExit, match="the sum is wrong"):
        speed.main(["--clients", "4", "--dim", "100", "--floor", "0"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clients", "0"], "clients must be >= 1, got 0"),
        (["--clients", "3", "--dropouts", "3"], "dropouts must be below 3, got 3"),
        (["--malicious", "--threshold", "0.5"], "threshold must be above 2/3 with --malicious, got 0.5"),
    ],
)
def test_impossible_sessions_are_refused(flags, message, capsys):
    assert speed.main(flags) == 2
    assert message in capsys.readouterr().err


def test_flowers_primitives_are_timed_beside_ours_or_their_absence_is_told(capsys):
    code = speed.main(["--clients", "3", "--dim", "50", "--flower", "--json"])
    said = capsys.readouterr()
    if code == 2:
        assert "flower must be installed" in said.err
    else:
        assert len(json.loads(said.out)["primitives"]) == 4


def cell(model, n, psnr):
    values = {
        "psnr_db": [[psnr] * n] * 5,
        "gain_db": [[psnr - 12] * n] * 5,
        "labels": [1.0] * 5,
        "seconds": 1,
    }
    weak = {**values, "psnr_db": [[psnr - 5] * n] * 5}
    return {"model": model, "clients": n, "attacks": {"idlg:steps=1": weak, "inverting:steps=1": values}}


def test_the_stronger_attack_counts_and_images_above_the_threshold_are_counted_one_by_one():
    found = leak.summary(cell("mlp", 4, 25.0))
    assert found["attack"] == "inverting"
    assert found["mean"]["mean"] == 25.0
    assert found["success"]["value"] == 1.0
    assert found["success"]["ci95"][0] == pytest.approx(0.025 ** (1 / 20))


def test_results_that_are_there_are_shown_and_drawn_and_not_run_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "leak.json"
    cells = [cell("mlp", n, 30.0 - n) for n in (1, 2)]
    out.write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(leak, "measure", None)
    assert leak.main(["--models", "mlp", "--cohorts", "1", "2", "--out", str(out)]) == 0
    assert "29.0" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_cell_runs_both_attacks_on_the_same_cohorts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leak, "ATTACKS", ("idlg:steps=5", "inverting:steps=5"))
    monkeypatch.setattr(leak, "VICTIMS", 2)
    out = tmp_path / "leak.json"
    assert leak.main(["--models", "mlp", "--cohorts", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    (found,) = result["cells"]
    assert set(found["attacks"]) == {"idlg:steps=5", "inverting:steps=5"}
    assert [len(v) for v in found["attacks"]["idlg:steps=5"]["psnr_db"]] == [2, 2]
    assert result["command"]
    assert "mlp" in capsys.readouterr().out


SESSIONS = ("complete-0", "complete-30", "regular-0", "regular-10", "signed-0")


def test_the_documentation_shows_the_committed_results():
    text = (Path(__file__).parents[1] / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")
    folder = Path(speed.__file__).parent / "results" / "secagg_speed"
    sessions = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in SESSIONS]
    assert speed.compare(sessions) in text
    assert leak.show(json.loads(leak.HERE.read_text(encoding="utf-8"))) in text


def test_the_committed_results_keep_what_was_aimed_at():
    """At most 1.2 times the arithmetic for a complete graph; at most 0.24 of that for a sparse one."""
    folder = Path(speed.__file__).parent / "results" / "secagg_speed"
    found = {n: json.loads((folder / f"{n}.json").read_text(encoding="utf-8"))["session"] for n in SESSIONS}
    for name in ("complete-0", "complete-30"):
        assert found[name]["seconds"] <= 1.2 * found[name]["arithmetic_seconds"]
    assert found["regular-0"]["seconds"] <= 2.7 / 11.3 * found["complete-0"]["seconds"]
