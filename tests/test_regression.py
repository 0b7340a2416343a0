"""Leakage as a regression test: what is measured, how it is judged, and how it is told."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from math import comb
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import leakage_gate as benchmark

from fltoolkit.cli import main
from fltoolkit.errors import InputError
from fltoolkit.pytest_plugin import _locked
from fltoolkit.regression.baseline import Baseline, Case, Entry
from fltoolkit.regression.decide import FEW, LESS, LIMIT, MISSING, MORE, SAME, compare, judge, level_of
from fltoolkit.regression.gate import check, failures, measured, update
from fltoolkit.regression.measure import measure
from fltoolkit.regression.show import show
from fltoolkit.secagg import bonawitz_client, bonawitz_server

pytest_plugins = "pytester"

CHEAP = "idlg:restarts=1,steps=20,adapt=true"


def noise(sigma):
    return f"gaussian:placement=client,noise_multiplier={sigma}"


# --- what is measured -----------------------------------------------------------------------------------


def test_noise_and_length_are_measured_as_they_are():
    """σ C = 0.1 on D = 2,410 coordinates: known to 1.5 % from each victim."""
    found = measure(Case(CHEAP, victims=3, defenses=("clip:norm=0.5", noise(0.2))), 0)
    assert found["noise_std"] == pytest.approx([0.1] * 3, rel=0.06)
    clipped = measure(Case(CHEAP, victims=3, defenses=("clip:norm=0.5",)), 0)
    assert clipped["sent_norm"] == pytest.approx([0.5] * 3)
    assert clipped["noise_std"] == [0.0] * 3
    assert "reused" not in clipped


def test_masks_that_are_used_twice_are_seen(monkeypatch):
    case = Case(CHEAP, victims=2, clients=3, defenses=("secagg",))
    assert max(measure(case, 0)["reused"]) < 0.01
    real = bonawitz_client.add_mask
    for module in (bonawitz_client, bonawitz_server):
        monkeypatch.setattr(module, "add_mask", lambda w, seed, subtract=False: real(w, bytes(16), subtract))
    assert measure(case, 0)["reused"] == [1.0, 1.0]


def test_a_round_that_is_given_up_shows_nothing():
    case = Case("isolation:inner=idlg,steps=5", victims=2, clients=3, defenses=("secagg",))
    found = measure(case, 0)
    assert found["sent_norm"] == found["noise_std"] == found["reused"] == [0.0, 0.0]


# --- how it is judged -----------------------------------------------------------------------------------


def test_unchanged_values_alarm_no_more_often_than_stated():
    """4,000 pairs from one law each, at 5 %: within five standard deviations of the level, or below."""
    rng = np.random.default_rng(0)
    for draw in (lambda: rng.normal(20, 5, 12), lambda: rng.integers(0, 3, 12) * 20.0):
        alarms = sum(compare("psnr_db", list(draw()), list(draw()), 0.05)[1] != SAME for _ in range(2000))
        assert alarms <= binom.ppf(1 - 1e-6, 2000, 0.05)


@pytest.mark.parametrize(
    ("metric", "old", "new", "verdict"),
    [
        ("psnr_db", [10.0, 11.0, 12.0] * 4, [30.0, 31.0, 32.0] * 4, MORE),
        ("psnr_db", [30.0, 31.0, 32.0] * 4, [10.0, 11.0, 12.0] * 4, LESS),
        ("noise_std", [0.1] * 12, [0.05] * 12, MORE),
        ("noise_std", [0.05] * 12, [0.1] * 12, LESS),
        ("sent_norm", [0.5] * 12, [1.0] * 12, MORE),
        ("reused", [0.0] * 12, [1.0] * 12, MORE),
        ("psnr_db", [20.0] * 12, [20.5] * 12, SAME),
        ("sent_norm", [0.5] * 12, [0.505] * 12, SAME),
        ("psnr_db", [20.0] * 12, [20.0] * 12, SAME),
        ("psnr_db", [10.0] * 3, [30.0] * 3, FEW),
        ("psnr_db", [10.0 + k for k in range(8)], [30.0 + k for k in range(8)], FEW),
        ("psnr_db", [10.0 + k for k in range(9)], [30.0 + k for k in range(9)], MORE),
    ],
)
def test_changes_are_told_in_their_direction(metric, old, new, verdict):
    assert compare(metric, old, new, 1e-4)[1] == verdict


def test_untied_values_are_judged_by_the_exact_test():
    """Of all C(24, 12) orders, with none, one, ... of the old above the new: U <= 2 has 1 + 1 + 2 of them."""
    old, new = [float(k) for k in range(12)], [20.0 + k for k in range(12)]
    assert compare("psnr_db", old, new, 1e-4)[0] == pytest.approx(2 / comb(24, 12))
    new[0] = 9.5  # below two of the old
    assert compare("psnr_db", old, new, 1e-4)[0] == pytest.approx(2 * 4 / comb(24, 12))


def test_no_entry_of_the_projects_own_baseline_is_too_small_to_fail():
    known = Baseline.load(Path(__file__).parents[1] / "leakage.json")
    level = level_of(known.alpha, known.entries)
    for name, entry in known.entries.items():
        for metric, values in entry.measured.items():
            assert compare(metric, values, [v + 1e6 + k for k, v in enumerate(values)], level)[1] != FEW, name


def test_a_limit_holds_with_and_without_a_baseline():
    low, high = {"psnr_db": [10.0, 11.0, 12.0]}, {"psnr_db": [30.0, 31.0, 32.0]}
    assert [v.verdict for v in judge("x", None, low, 0.01, 15.0)] == [SAME]
    assert [v.verdict for v in judge("x", None, high, 0.01, 15.0)] == [LIMIT]
    assert [v.verdict for v in judge("x", Entry(Case(), high), high, 0.01, 15.0)] == [LIMIT]
    assert [v.verdict for v in judge("x", None, high, 0.01, None)] == [MISSING]
    near = {"psnr_db": [5.0, 16.0, 27.0]}  # the mean is above, its interval is not
    assert [v.verdict for v in judge("x", None, near, 0.01, 15.0)] == [SAME]


def test_a_metric_that_is_gone_is_an_error():
    with pytest.raises(InputError, match="x: reused is in the baseline and can no longer be measured"):
        judge("x", Entry(Case(), {"reused": [0.0]}), {"psnr_db": [1.0]}, 0.01, None)


def test_the_level_is_shared_by_all_metrics_of_a_baseline():
    entries = {"a": Entry(Case(), {"psnr_db": [], "sent_norm": []}), "b": Entry(Case(), {"psnr_db": []})}
    assert level_of(0.03, entries) == pytest.approx(0.01)
    assert level_of(0.01, {}) == 0.01


def small(defenses=("clip:norm=0.5",)):
    case = Case(CHEAP, defenses=defenses)
    return Baseline({"clip": measured(case, 0, "first")})


def test_a_clean_check_passes_and_a_defense_that_is_off_does_not():
    known = small()
    assert not failures(check(known, 1))
    entry = known.entries["clip"]
    for defenses, metric in (((), "sent_norm"), (("clip:norm=1",), "sent_norm")):
        broken = replace(known, entries={"clip": replace(entry, case=replace(entry.case, defenses=defenses))})
        assert [v.metric for v in failures(check(broken, 1))] == [metric]
        assert failures(check(broken, 1))[0].verdict == MORE
    with pytest.raises(InputError, match="seed must be another than the baseline's of 'clip', got 0"):
        check(known, 0)
    with pytest.raises(InputError, match="unknown entry 'none'"):
        check(known, 1, "none")


def test_an_update_keeps_its_reason_and_touches_what_was_asked_for_only():
    known = Baseline({"a": Entry(Case(CHEAP, victims=2), {"psnr_db": [0.0]}), "b": Entry(Case(CHEAP))})
    new = update(known, "a stronger attack", "a")
    assert new.entries["a"].reason == "a stronger attack"
    assert len(new.entries["a"].measured["psnr_db"]) == 2
    assert new.entries["a"].versions["torch"]
    assert new.entries["b"] is known.entries["b"]
    with pytest.raises(InputError, match="reason must be why the change is accepted, got ' '"):
        update(known, " ")
    with pytest.raises(InputError, match="baseline must hold at least one entry"):
        update(Baseline({}), "why")


# --- the file -------------------------------------------------------------------------------------------


def test_a_baseline_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "leakage.json"
    case = Case(CHEAP, victims=2, defenses=("clip:norm=0.5",), local_batch=3, max_psnr_db=15.0)
    known = Baseline({"x": Entry(case, {"psnr_db": [1.5, 2.0]}, 0, "why", {"torch": "2"})}, 0.02)
    known.save(path)
    assert Baseline.load(path) == known
    content = json.loads(path.read_text())
    assert "model" not in content["entries"]["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "baseline must be JSON"),
        ("[]", "baseline must be a JSON object, got 'list'"),
        ('{"schema": "other"}', "schema of the baseline must be 'fltoolkit/leakage-1', got 'other'"),
        (
            '{"schema": "fltoolkit/leakage-1", "alpha": 2, "entries": {}}',
            "alpha must be a number between 0 and 1, got 2",
        ),
        ('{"schema": "fltoolkit/leakage-1", "alpha": "x", "entries": {}}', "alpha must be a number between"),
        ('{"schema": "fltoolkit/leakage-1"}', "entries of the baseline must be a JSON object, got None"),
        (
            '{"schema": "fltoolkit/leakage-1", "entries": {"x": 3}}',
            "'x' in the baseline must be a JSON object",
        ),
        (
            '{"schema": "fltoolkit/leakage-1", "entries": {"x": {"victims": "12"}}}',
            "victims of 'x' in the baseline must be of type int, got '12'",
        ),
        (
            '{"schema": "fltoolkit/leakage-1", "entries": {"x": {"atack": "dlg"}}}',
            "unknown field of 'x' in the baseline 'atack'; did you mean 'attack'",
        ),
        (
            '{"schema": "fltoolkit/leakage-1", "entries": {"x": {"victims": 1}}}',
            "victims must be >= 2, got 1",
        ),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path, text, message):
    path = tmp_path / "leakage.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Baseline.load(path)


def test_a_baseline_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="baseline must be a file that can be read"):
        Baseline.load(tmp_path / "none.json")


# --- the command ----------------------------------------------------------------------------------------


def test_the_commands_add_check_and_update(tmp_path, capsys):
    path = str(tmp_path / "leakage.json")
    add = ["leakage", "add", "clip", "--baseline", path, "--attack", CHEAP, "--defense", "clip:norm=0.5"]
    assert main(add) == 0
    assert "sent_norm 0.5" in capsys.readouterr().err
    assert main(add) == 2
    assert "name must be new, got 'clip'" in capsys.readouterr().err
    assert main(["leakage", "check", "--baseline", path]) == 0
    assert "all 3 metrics of 1 entries pass" in capsys.readouterr().out
    text = (tmp_path / "leakage.json").read_text().replace("clip:norm=0.5", "clip:norm=1")
    (tmp_path / "leakage.json").write_text(text)
    assert main(["leakage", "check", "--baseline", path]) == 1
    out = capsys.readouterr().out
    assert "leaks more" in out
    assert "1 of 3 metrics of 1 entries do not pass" in out
    assert main(["leakage", "check", "--baseline", path, "--format", "github"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(
        f"::error file={path},title=leakage: clip::sent_norm leaks more: 0.5 -> 1 [1, 1], p ="
    )
    assert main(["leakage", "update", "--baseline", path, "--reason", "a wider clip"]) == 0
    assert main(["leakage", "check", "--baseline", path, "--format", "github"]) == 0
    assert "::notice" in capsys.readouterr().out
    assert main(["leakage", "check", "--baseline", path, "--format", "xml"]) == 2
    assert main(["leakage", "update", "--baseline", path]) == 2


def test_sarif_has_the_shape_that_code_scanning_reads():
    verdicts = judge("x", Entry(Case(), {"psnr_db": [1.0] * 12}), {"psnr_db": [30.0] * 12}, 0.01, None)
    found = json.loads(show(verdicts, "sarif", "leakage.json"))
    shape = {
        "type": "object",
        "required": ["version", "runs"],
        "properties": {
            "version": {"const": "2.1.0"},
            "runs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["tool", "results"],
                    "properties": {
                        "results": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["ruleId", "level", "message", "locations"],
                            },
                        }
                    },
                },
            },
        },
    }
    jsonschema.validate(found, shape)
    (result,) = found["runs"][0]["results"]
    rules = [r["id"] for r in found["runs"][0]["tool"]["driver"]["rules"]]
    assert result["ruleId"] == "leakage/leaks-more"
    assert result["ruleId"] in rules
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "leakage.json"


# --- the plugin -----------------------------------------------------------------------------------------

TESTS = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))

def test_mine(leakage):
    leakage.check("mine", model(), defenses=["clip:norm={norm}"], attack="{attack}", victims=8)

def test_limit(leakage):
    leakage.check("limit", model(), attack="idlg:steps=60", max_psnr_db=15, victims=3)
"""


@pytest.fixture
def project(pytester):
    pytester.makepyfile(test_it=TESTS.replace("{norm}", "0.5").replace("{attack}", CHEAP))
    return pytester


def test_the_plugin_needs_a_baseline_or_a_limit_then_passes_then_catches(project):
    first = project.runpytest("-p", "no:cacheprovider")
    first.assert_outcomes(failed=2)
    first.stdout.fnmatch_lines(["*no baseline for 'mine' in *: run pytest --leakage-update*"])
    first.stdout.fnmatch_lines(["*limit*psnr_db*above the limit*"])
    project.runpytest("--leakage-update", "-k", "mine").assert_outcomes(passed=1)
    again = project.runpytest("-k", "mine", "--junitxml=out.xml", "-o", "junit_family=xunit1")
    again.assert_outcomes(passed=1)
    assert 'name="leakage.sent_norm" value="0.5"' in (project.path / "out.xml").read_text()
    file = project.path / "leakage.json"
    file.write_text(file.read_text().replace("clip:norm=0.5", "clip:norm=1"))
    changed = project.runpytest("-k", "mine")
    changed.stdout.fnmatch_lines(["*'mine' measures another case than the baseline*"])
    project.makepyfile(test_it=TESTS.replace("{norm}", "1").replace("{attack}", CHEAP))
    caught = project.runpytest("-k", "mine")
    caught.assert_outcomes(failed=1)
    caught.stdout.fnmatch_lines(["*mine*sent_norm*0.5*leaks more*"])


def test_workers_of_xdist_write_one_baseline(project):
    """Both tests' entries, whichever worker measured which."""
    done = project.runpytest_subprocess("-n", "2", "--leakage-update", "--leakage-reason", "first")
    done.assert_outcomes(passed=2)
    entries = json.loads((project.path / "leakage.json").read_text())["entries"]
    assert {n: e["reason"] for n, e in entries.items()} == {"mine": "first", "limit": "first"}
    assert not list(project.path.glob("*.lock"))


def test_workers_take_turns_at_the_baseline(tmp_path):
    path, inside, most = tmp_path / "leakage.json", [], []

    def work():
        with _locked(path):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert most == [1] * 5
    assert not list(tmp_path.iterdir())


# --- the benchmark --------------------------------------------------------------------------------------


def test_the_committed_error_rates_are_shown_and_are_what_was_aimed_at():
    """At most 1 % of clean checks alarm, and at least 95 % of broken ones, of 200 and of 40 each."""
    root = Path(__file__).parents[1]
    result = json.loads((root / "benchmarks" / "results" / "leakage_gate.json").read_text(encoding="utf-8"))
    assert benchmark.show(result) in (root / "docs" / "leakage-gate.md").read_text(encoding="utf-8")
    assert len(result["clean"]) >= 200
    assert sum(result["clean"]) <= 0.01 * len(result["clean"])
    assert result["broken"].keys() == benchmark.BROKEN.keys()
    assert all(sum(v) >= 0.95 * len(v) and len(v) >= 40 for v in result["broken"].values())


def test_the_benchmark_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gate.json"
    out.write_text(json.dumps({"clean": [False], "broken": {n: [True] for n in benchmark.BROKEN}}))
    monkeypatch.setattr(benchmark, "baseline", lambda: None)
    monkeypatch.setattr(benchmark, "clean", lambda known, seed: seed == 2)
    monkeypatch.setattr(benchmark, "broken", None)
    assert benchmark.main(["--repeats", "2", "--broken", "1", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["clean"] == [False, True]
    assert "50.0%" in capsys.readouterr().out
