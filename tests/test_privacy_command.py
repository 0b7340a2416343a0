"""`python -m fltoolkit epsilon` and `sigma`: what they print, refuse and warn of."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fltoolkit import cli
from fltoolkit.accounting import attained_epsilon, gaussian_epsilon, gaussian_sigma
from fltoolkit.commands.privacy import _up

EPSILON = ["epsilon", "--noise-multiplier", "1.1", "--sampling-rate", "0.01", "--steps", "1000"]
SIGMA = ["sigma", "--epsilon", "2", "--sampling-rate", "0.1", "--steps", "100"]
FIXED = ["--sampling", "fixed", "--population", "100"]


def run(capsys, *flags):
    """Exit code, stdout and stderr."""
    code = cli.main(list(flags))
    return code, *capsys.readouterr()


def report(capsys, *flags):
    code, out, _ = run(capsys, *flags, "--json")
    assert code == 0
    return json.loads(out)


def test_epsilon_in_words(capsys):
    code, out, err = run(capsys, *EPSILON)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "ε = 1.5155 at δ = 1e-05 after 1,000 steps with σ = 1.1"
    words = ("unit: one record", "adjacency: add-remove", "sampling: poisson", "accountant: pld")
    for line, word in zip(lines[1:5], words, strict=True):
        assert line.startswith(f"  {word}")
    assert "divided by the clip norm" in lines[-1]
    assert len(lines) == 6


def test_sigma_in_words(capsys):
    code, out, _ = run(capsys, *SIGMA)
    assert code == 0
    assert out.startswith("σ = 2.24781 gives ε = 1.9999, at most 2, at δ = 1e-05 after 100 steps\n")


def test_fixed_cohorts_say_what_does_not_hold(capsys):
    _, out, _ = run(capsys, *EPSILON, *FIXED)
    first, *_, last = out.splitlines()
    assert first.startswith("ε = 10.959 ")
    assert "replace-one" in out
    assert "1 of 100 records without replacement" in out
    for words in ("Poisson sampling does not hold", "1.5155 under add-remove", "2.478 under", "reach 9.8132"):
        assert words in last
    _, whole, _ = run(
        capsys, "epsilon", "--noise-multiplier", "2", "--sampling-rate", "1", "--steps", "3", *FIXED
    )
    assert "does not hold" not in whole


def test_json_holds_inputs_and_results_and_nothing_else_is_printed(capsys):
    code, out, err = run(capsys, *EPSILON, *FIXED, "--delta", "1e-6", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["schema"] == "fltoolkit.epsilon/1"
    assert found["inputs"] == {
        "sampling_rate": 0.01,
        "steps": 1000,
        "delta": 1e-6,
        "accountant": "pld",
        "adjacency": "replace-one",
        "sampling": "fixed",
        "population": 100,
    }
    expected = gaussian_epsilon(
        1.1, 0.01, 1000, 1e-6, adjacency="replace-one", sampling="fixed", population=100
    )
    assert (found["noise_multiplier"], found["epsilon"]) == (1.1, expected)
    assert found["other_samplings"] == {
        "poisson add-remove": gaussian_epsilon(1.1, 0.01, 1000, 1e-6),
        "poisson replace-one": gaussian_epsilon(1.1, 0.01, 1000, 1e-6, adjacency="replace-one"),
        "fixed replace-one at least": attained_epsilon(1.1, 0.01, 1000, 1e-6),
    }
    assert len(found["assumptions"]) == 5
    assert {"python", "dp-accounting", "opacus"} <= set(found["versions"])
    assert "command" in found


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
def test_sigma_and_epsilon_agree(capsys, accountant):
    found = report(capsys, *SIGMA, "--accountant", accountant)
    assert found["schema"] == "fltoolkit.sigma/1"
    assert found["target_epsilon"] == 2
    assert found["noise_multiplier"] == gaussian_sigma(2, 0.1, 100, 1e-5, accountant=accountant)
    back = ["epsilon", "--noise-multiplier", str(found["noise_multiplier"]), *SIGMA[3:]]
    assert report(capsys, *back, "--accountant", accountant)["epsilon"] == found["epsilon"] <= 2


def test_defaults_of_adjacency_and_of_the_full_rate(capsys):
    full = ["epsilon", "--noise-multiplier", "5", "--steps", "100", "--sampling", "full"]
    found = report(capsys, *full)
    assert found["inputs"]["sampling_rate"] == 1
    assert found["inputs"]["adjacency"] == "add-remove"
    assert found["epsilon"] == pytest.approx(9.997256, rel=1e-6)
    assert found["other_samplings"] == {}
    replaced = report(capsys, *full, "--adjacency", "replace-one")["epsilon"]
    assert replaced == gaussian_epsilon(2.5, 1, 100, 1e-5)


def test_a_delta_as_large_as_one_record_is_warned_of(capsys):
    for delta, warned in (("1e-3", True), ("0.00099", False)):
        code, out, err = run(capsys, *EPSILON, "--population", "1000", "--delta", delta, "--json")
        assert code == 0
        assert json.loads(out)["inputs"]["population"] == 1000
        assert (err != "") is warned
        assert (
            not warned
            or err == "warning: δ = 0.001 is not below 1 / 1,000: publishing one record whole would do\n"
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["epsilon", "--sampling-rate", "0.1", "--steps", "1"], "noise_multiplier must be given, got None"),
        (["epsilon", "--noise-multiplier", "1", "--steps", "1"], "sampling_rate must be given, got None"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.1"], "steps must be given, got None"),
        (["sigma", "--sampling-rate", "0.1", "--steps", "1"], "epsilon must be given, got None"),
        ([*EPSILON, "--delta", "1"], "delta must be between 0 and 1, got 1.0"),
        ([*EPSILON, "--sampling", "full"], "sampling_rate must be 1 where sampling is full, got 0.01"),
        ([*EPSILON, "--sampling", "fixed"], "population must be given where sampling is fixed, got None"),
        ([*EPSILON, *FIXED, "--adjacency", "add-remove"], "with 'replace-one' ε = 10.958"),
        ([*SIGMA, *FIXED, "--adjacency", "add-remove"], "with 'replace-one' σ = 4.7627"),
        ([*EPSILON, *FIXED, "--accountant", "prv"], "accountant must be 'pld' or 'rdp'"),
        ([*SIGMA, "--epsilon", "-1"], "epsilon must be a finite number > 0, got -1.0"),
    ],
)
def test_impossible_flags_end_in_a_sentence(capsys, flags, message):
    code, out, err = run(capsys, *flags, "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_numbers_are_rounded_up():
    assert [_up(v) for v in (1.00001, 9.99991, 0.0123456, 123456.7, 2.0, 0.0)] == [
        "1.0001",
        "10",
        "0.012346",
        "1.2346e+05",
        "2",
        "0",
    ]


def test_the_module_runs_and_accountants_are_imported_late():
    code = (
        "import sys; from fltoolkit import cli; import fltoolkit.accounting; "
        "assert not {'opacus', 'dp_accounting'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-m", "fltoolkit", *EPSILON, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["command"] == "python -m fltoolkit " + " ".join([*EPSILON, "--json"])
