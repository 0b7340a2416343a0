"""The DP-SGD benchmark: every mode computes the same sum, ratios come from times, failures are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import dpsgd_speed as speed
from dpsgd_modes import Case

from fltoolkit.loss import cross_entropy
from fltoolkit.training.private.clipped import per_example_rows

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of Opacus
TINY = Case("small", 6, at_least=(("hooks", 1.4), ("broken", 2.0)), memory_at_most=(("ghost", 1.3),))


def broken(_):
    raise ZeroDivisionError("nothing to\ndivide")


@pytest.fixture
def tiny(monkeypatch):
    """One small case, three modes and one that fails; memory is not measured in processes of its own."""
    chosen = ("ours", "non-private", "hooks")
    monkeypatch.setattr(speed, "MODES", {n: speed.MODES[n] for n in chosen} | {"broken": broken})
    monkeypatch.setattr(speed, "CASES", {"tiny": TINY})
    monkeypatch.setattr(speed, "wait_until_quiet", lambda patience: float("nan"))
    monkeypatch.setattr(speed, "isolated_growth", lambda mode, *_: {"ours": 10.0}.get(mode, "Error: no"))


def test_it_runs_and_tells_what_failed(tiny, tmp_path, capsys):
    out = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    try:
        speed.main(["--turns", "2", "--calls", "1", "--threads", "1", "--out", str(out), "--json"])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    case = found["tiny"]
    assert case["left_out"] == {"broken": "ZeroDivisionError: nothing to"}
    assert set(case["milliseconds"]) == {"ours", "non-private", "hooks"}
    ours, hooks = (case["milliseconds"][n]["turns"] for n in ("ours", "hooks"))
    assert case["ratio_to_ours"]["hooks"]["turns"] == [h / o for h, o in zip(hooks, ours, strict=True)]
    assert case["targets"][1] | {"what": ""} == {"what": "", "target": ">= 2", "value": None, "met": None}
    assert case["machine"]["threads"] == 1
    assert {"torch", "opacus"} <= set(case["versions"])
    text = speed.render(found)
    assert "broken left out: ZeroDivisionError: nothing to" in text
    assert "time broken / ours: not measured, target >= 2: unknown" in text
    assert Image.open(out.with_suffix(".png")).size[0] > 500


@pytest.mark.parametrize("mode", [m for m in speed.MODES if m != speed.BASE])
def test_every_mode_computes_the_clipped_sum(mode):
    s = speed.scene(Case("small", 9), 1)
    every = per_example_rows(s.model, cross_entropy, s.layout, s.x, s.y)
    norms = every.norm(dim=1)
    assert 0 < int((norms > s.norm).sum()) < 9
    expected = sum(g * min(1.0, s.norm / float(n)) for g, n in zip(every, norms, strict=True))
    step = speed.MODES[mode](s)
    for _ in range(2):
        assert float((step() - expected).norm() / expected.norm()) < 1e-4


def test_the_base_is_the_plain_gradient():
    s = speed.scene(Case("small", 9), 1)
    every = per_example_rows(s.model, cross_entropy, s.layout, s.x, s.y)
    found = speed.MODES[speed.BASE](s)()
    assert float((found - every.mean(0)).norm() / every.mean(0).norm()) < 1e-5


def test_the_models_are_those_of_the_targets():
    assert speed.scene(speed.CASES["cnn-64"], 0).layout.size == 1_663_370
    assert speed.scene(speed.CASES["small-64"], 0).layout.size == 26_010
    assert [len(speed.scene(c, 0).x) for c in speed.CASES.values()] == [64, 256, 64]


def test_ratios_are_of_times_within_a_turn():
    assert speed.ratios({"ours": [2.0, 4.0], "hooks": [6.0, 4.0]}) == {"ours": [1, 1], "hooks": [3, 1]}


@pytest.mark.parametrize(("hooks", "met"), [([1.3, 1.5, 1.2], False), ([1.3, 1.4, 1.5], True)])
def test_a_target_is_judged_by_the_median(hooks, met):
    (first, second, third) = speed.judged(TINY, {"hooks": hooks}, {"ours": 14.0, "ghost": 10.0})
    assert (first["value"], first["met"]) == (sorted(hooks)[1], met)
    assert second["met"] is None
    assert (third["value"], third["met"]) == (1.4, False)
    assert speed.judged(TINY, {}, {"ours": 13.0, "ghost": 10.0})[2]["met"]
    assert speed.judged(TINY, {}, {"ours": 13.0, "ghost": "Error: no"})[2]["value"] is None


def test_memory_is_what_the_calls_add(monkeypatch):
    """A mode that fills 64 MiB, in a process that had more before, of which the allocator keeps 128."""

    def filling(_):
        return lambda: torch.ones(16 << 20)

    torch.ones(64 << 20)
    kept = [torch.ones(1 << 14) for _ in range(2048)]
    del kept[:-1]
    monkeypatch.setitem(speed.MODES, "filling", filling)
    threads = torch.get_num_threads()
    assert 60 < speed.growth_mib("filling", Case("small", 2), 0, threads) < 90


def test_memory_of_a_mode_that_fails_is_a_reason():
    assert speed.isolated_growth("no such mode", Case("small", 2), 0, 1).startswith("KeyError")


def test_models_are_not_shared_between_modes():
    """Opacus marks the parameters it wraps."""
    case = Case("small", 2)
    one, other = speed.scene(case, 0), speed.scene(case, 0)
    assert torch.equal(one.layout.row(one.model), other.layout.row(other.model))
    assert isinstance(one.model, nn.Sequential)
    assert next(one.model.parameters()) is not next(other.model.parameters())


def test_bad_numbers_are_refused():
    with pytest.raises(SystemExit, match="turns must be >= 1, got 0"):
        speed.main(["--turns", "0"])
