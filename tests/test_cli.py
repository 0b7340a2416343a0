"""The command line as a user meets it: in its own process, in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import jsonschema
import pytest
import torch
from PIL import Image
from torch import nn

from fltoolkit import cli
from fltoolkit.accounting import gaussian_epsilon
from fltoolkit.report.document import schema

FILES = ["accuracy.png", "checkpoint.pt", "metrics.jsonl", "report.json", "tensorboard"]
QUICK = ["--data", "digits", "--model", "mlp", "--steps", "40"]


def shell(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("package", ["attacks", "fltoolkit"])
@pytest.mark.parametrize(
    ("told", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")]
)
def test_threads_wait_without_holding_their_core_unless_told_otherwise(package, told, expected):
    program = (
        f"import os, sys, {package}; print(os.environ.get('GOMP_SPINCOUNT', ''), 'torch' in sys.modules)"
    )
    others = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=others | told)
    assert done.stdout == f"{expected} False\n"


def test_an_output_that_nobody_reads_on_ends_without_a_word(tmp_path):
    """As in `python -m fltoolkit table NAME --show | head -1`."""
    told = ["table", "figure1", "--out", "o", "--show"]
    command = [sys.executable, "-m", "fltoolkit", *told]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_another_broken_pipe_is_not_kept_quiet():
    def lost():
        raise BrokenPipeError("to a worker")

    with pytest.raises(BrokenPipeError, match="to a worker"):
        cli.guarded(lost)


@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_attack_command_writes_its_files_and_a_table(name, tmp_path):
    done = shell(f"attacks.{name}", "--batch", "1", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{name}-")
    assert sorted(p.name for p in folder.iterdir()) == ["reconstruction.png", "report.json"]
    report = json.loads((folder / "report.json").read_text())
    jsonschema.validate(report, schema())
    assert report["command"].startswith(f"python -m attacks.{name} --batch 1 --data digits")
    assert Image.open(folder / "reconstruction.png").size[0] > 800
    for word in ("true label", "recovered", "PSNR dB", "SSIM", "MSE", "gain dB", "iterations", "seconds"):
        assert word in done.stdout
    assert "matching loss" in done.stderr
    assert "PSNR" not in done.stderr


def test_json_is_one_object_alone_on_stdout(tmp_path):
    done = shell("attacks.idlg", *QUICK, "--victims", "2", "--json", "--out", "o", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "o" / "report.json").read_text())
    assert len(report["metrics"]["psnr_db"]["values"]) == 2


def test_both_doors_lead_to_the_same_numbers(tmp_path, capsys):
    flags = [*QUICK, "--defense", "clip:norm=0.5", "--defense", "gaussian:noise_multiplier=0.1", "--json"]
    one = json.loads(shell("attacks.idlg", *flags, "--out", "a", cwd=tmp_path).stdout)
    assert cli.main(["audit", "--attack", "idlg", *flags, "--out", str(tmp_path / "b")]) == 0
    two = json.loads(capsys.readouterr().out)
    assert one["metrics"] == two["metrics"]
    assert [d["name"] for d in two["defenses"]] == ["clip", "gaussian"]
    assert two["epsilon"]["message"] is None
    assert two["epsilon"]["aggregate"] == pytest.approx(91.82, abs=0.1)


def test_train_writes_curve_checkpoint_and_report_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["train", "--clients", "20", "--fraction", "0.3", "--defense", "clip:norm=1", "--json"]
    assert cli.main([*flags, "--rounds", "4", "--out", "whole"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert sorted(os.listdir("whole")) == FILES
    assert cli.main([*flags, "--rounds", "2", "--out", "half"]) == 0
    capsys.readouterr()
    assert cli.main([*flags, "--rounds", "4", "--out", "half", "--resume"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["accuracy"] == whole["accuracy"]
    assert [a["round"] for a in whole["accuracy"]] == [1, 2, 3, 4]
    assert cli.main([*flags, "--rounds", "5", "--out", "half", "--resume", "--lr", "0.3"]) == 2
    assert "error: lr must be 0.5 as in 'half/checkpoint.pt'" in capsys.readouterr().err


def test_a_resumed_run_tells_of_every_look(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["train", "--clients", "20", "--batch", "1", "--epochs", "1", "--model", "softmax", "--json"]
    flags += ["--attack", "idlg:steps=3,restarts=1", "--attack-every", "2"]

    def run(out, rounds, *more):
        assert cli.main([*flags, "--rounds", rounds, "--out", out, *more]) == 0
        return json.loads(capsys.readouterr().out)

    whole = run("whole", "6")
    assert [look["round"] for look in whole["leakage"]] == [1, 3, 5]
    run("half", "4")
    shutil.copy("whole/looks.pt", "half")  # as where a run dies before the checkpoint that it goes with
    assert run("half", "6", "--resume")["leakage"] == whole["leakage"]
    assert [look["round"] for look in run("half", "6", "--resume", "--threat", "server")["leakage"]] == [
        1,
        3,
        5,
    ]
    other = run("half", "7", "--resume", "--attack", "idlg:steps=2,restarts=1")
    assert [look["round"] for look in other["leakage"]] == [7]


def test_what_an_output_cannot_write_is_no_error(tmp_path):
    told = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fltoolkit", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=told, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "learning rate ?" in done.stdout


def test_statistics_that_nobody_averages_are_warned_of(tmp_path, capsys):
    flags = ["train", "--rounds", "1", "--epochs", "1", "--out", str(tmp_path), "--model"]
    assert cli.main([*flags, f"{__name__}:normed"]) == 0
    assert "warning: FedAvg averages parameters alone" in capsys.readouterr().err
    assert cli.main([*flags, "softmax"]) == 0
    assert "warning" not in capsys.readouterr().err


def normed(shape, classes):
    return nn.Sequential(
        nn.Conv2d(shape[0], 2, 3),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(2 * (shape[1] - 2) ** 2, classes),
    )


def run_numbers(folder):
    """Everything a run leaves behind that is no time: parameters, metrics, curve."""
    lines = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((folder / "report.json").read_text())
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return (
        checkpoint["params"].numpy().tobytes(),
        checkpoint["history"],
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        report["accuracy"],
        report["epsilon"],
    )


def test_killed_at_any_moment_and_resumed_gives_the_uninterrupted_numbers(tmp_path):
    """A real process, killed with SIGKILL several times in the middle of its work."""
    flags = ["train", "--clients", "60", "--fraction", "0.5", "--epochs", "20", "--rounds", "40"]
    flags += [
        "--defense",
        "clip:norm=1",
        "--defense",
        "gaussian:noise_multiplier=0.1",
        "--checkpoint-every",
        "3",
    ]
    done = shell("fltoolkit", *flags, "--out", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "fltoolkit", *flags, "--out", "cut", "--resume"]
    metrics, kills = tmp_path / "cut" / "metrics.jsonl", 0
    for more in (4, 5, 9):
        before = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        running = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while running.poll() is None:
            written = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
            if written >= before + more:
                running.kill()
                kills += 1
                break
            time.sleep(0.002)
        running.wait()
    assert kills == 3
    assert not (tmp_path / "cut" / "report.json").exists()
    assert shell("fltoolkit", *flags, "--out", "cut", "--resume", cwd=tmp_path).returncode == 0
    assert run_numbers(tmp_path / "cut") == run_numbers(tmp_path / "whole")


def test_training_learns_the_digits(tmp_path, capsys):
    assert cli.main(["train", "--rounds", "25", "--json", "--out", str(tmp_path / "o")]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"][-1]
    assert 0.8 < accuracy["value"] < 0.97
    low, high = accuracy["ci95"]
    assert low < accuracy["value"] < high


def test_training_with_a_looker_on_and_noise_reports_both(tmp_path, capsys):
    flags = ["--clients", "700", "--fraction", "0.02", "--epochs", "1", "--batch", "inf", "--rounds", "3"]
    flags += ["--equal-weights"]
    defense = ["--defense", "clip:norm=1", "--defense", "gaussian:noise_multiplier=2"]
    out = ["--json", "--out", str(tmp_path / "o")]
    assert (
        cli.main(["train", *flags, *defense, "--attack", "idlg:steps=60", "--attack-every", "2", *out]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [look["round"] for look in report["leakage"]] == [1, 3]
    assert report["epsilon"]["message"] is None
    amplified = gaussian_epsilon(2, 0.02, 3, 1e-5, adjacency="replace-one", sampling="fixed", population=700)
    assert report["epsilon"]["aggregate"] == pytest.approx(amplified, rel=1e-3)
    assert 0.3 < amplified < 1
    assert (tmp_path / "o" / "reconstruction.png").exists()


def test_list_names_everything_there_is(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("dlg", "idlg", "clip:norm", "gaussian:", "secagg", "server", "aggregate", "2nn", "lenet"):
        assert f"  {name}" in out
    for name in ("digits", "photos", "mnist", "folder", "threat models:", "partitions:", "shards"):
        assert name in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--defense", "clip:norm=-1"], "error: norm must be a finite number > 0, got -1.0"),
        (["--defense", "klip"], "unknown defense 'klip'; did you mean 'clip'?"),
        (["--data", "folder:/no/such"], "data folder must be readable, got '/no/such'"),
        (["--model", "2nn", "--data", "nothing"], "unknown data set 'nothing'"),
        (["--batch", "500"], "batch must be at most the data's 100 examples"),
        (["--option", "hystory=3"], "unknown option of attack dlg 'hystory'; did you mean 'history'?"),
        (["--out", "/dev/null/x"], "out must be a folder that can be written"),
        (["--restarts", "0"], "restarts must be >= 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["audit", "--attack", "dlg", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "photos"], "data must have a test part to train on, got 'photos'"),
        (["--clients", "5000"], "clients must leave each part an example"),
        (["--fraction", "1.5"], "fraction must be between 0 and 1, got 1.5"),
        (["--partition", "random"], "unknown partition 'random'"),
        (["--attack", "delge"], "unknown attack 'delge'"),
        (["--rounds", "0"], "rounds must be >= 1, got 0"),
        (["--shuffle-buffer", "0"], "shuffle_buffer must be >= 1, got 0"),
        (["--precision", "fp8"], "precision must be one of ('float32', 'bf16'), got 'fp8'"),
    ],
)
def test_bad_training_input_too(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["audit", "--attack", "dlg"], ["train"]])
def test_help_gives_every_flag_a_text(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.count("default") >= 12


def test_attack_help_shows_the_attacks_own_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.attack_main("dlg", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "ranked by matching loss (default: 4)" in text
    assert "most iterations of a restart (default: 3000)" in text
