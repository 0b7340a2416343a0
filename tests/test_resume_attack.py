"""Attacks that are killed and resumed: the numbers of an uninterrupted run, without starting from zero."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model

from fltoolkit import cli, registry
from fltoolkit.inversion import keep, search
from fltoolkit.inversion.adam import Adam
from fltoolkit.inversion.keep import forget, keeping
from fltoolkit.inversion.lbfgs import LBFGS
from fltoolkit.types import LocalSpec

SEARCHES = {
    "difference": "difference:inner=idlg,steps=150,restarts=3",
    "disaggregation": "disaggregation:inner=idlg,steps=150,restarts=3",
    "inconsistency": "inconsistency:inner=idlg,steps=150,restarts=3",
    "isolation": "isolation:inner=idlg,steps=150,restarts=3",
    "dlfa": "dlfa:steps=150,restarts=3",
    "dlg": "dlg:steps=400,restarts=3,history=20",
    "gradinversion": "gradinversion:steps=150,restarts=3",
    "idlg": "idlg:steps=150,restarts=3,history=20",
    "inverting": "inverting:steps=400,restarts=3,tv=0,tolerance=1e-3",
    "natural": "natural:steps=150,restarts=3,history=20",
    "sme": "sme:steps=150,restarts=3",
}
OTHERS = {
    "features": "features:steps=5",
    "generative": "generative:steps=5,training=5",
    "learned": "learned:steps=5,simulations=64,hidden=8",
}


class KilledError(Exception):
    """The end of a process, as far as one process can play it."""


def victims(side=5, local=None):
    """Two, the second behind noise, so that its search goes on when the first has been matched."""
    found = []
    for seed in range(2):
        seen = observe(
            tiny_model(seed, side=side), tiny_examples(4, seed + 5, side=side), local=local or LocalSpec()
        )
        noise = torch.randn(seen.update.shape, generator=seeded(seed))
        noisy = replace(
            seen, update=seen.update + 0.01 * seed * noise, auxiliary=tiny_examples(40, 9, side=side)
        )
        found.append(noisy)
    return found


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def attack(spec, seen, progress=lambda step, of, text: None):
    return registry.make_attack(spec).many(seen, [seeded(s) for s in range(len(seen))], progress)


def killed_at(stop):
    def progress(step, of, text):
        if step == stop:
            raise KilledError

    return progress


def same(a, b):
    """Whether two lists of reconstructions agree to the last bit, but for the time they took."""
    return len(a) == len(b) and all(
        torch.equal(getattr(p, f.name), getattr(q, f.name))
        if isinstance(getattr(p, f.name), torch.Tensor)
        else getattr(p, f.name) == getattr(q, f.name)
        for p, q in zip(a, b, strict=True)
        for f in fields(p)
        if f.name != "seconds"
    )


@pytest.fixture
def steps(monkeypatch):
    """How many iterations have been taken, by whatever optimiser."""
    taken = []
    for kind in (Adam, LBFGS):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, step=step: (taken.append(1), step(self))[1])
    return taken


@pytest.mark.parametrize("name", SEARCHES)
def test_killed_and_resumed_is_the_uninterrupted_search(name, tmp_path, steps):
    """KilledError before and after restarts are dropped, schedules moved on and histories full."""
    seen = victims(local=LocalSpec(2, 2, 0.5)) if name == "dlfa" else victims()
    checks: list[int] = []
    whole = attack(SEARCHES[name], seen, lambda step, of, text: checks.append(step))
    needed, stops = len(steps), sorted({*checks[::4], *checks[-2:]})
    assert stops[:2] == [25, 125]
    steps.clear()
    with keeping(tmp_path, every=0):
        for stop in stops:
            with pytest.raises(KilledError):
                attack(SEARCHES[name], seen, killed_at(stop))
        assert same(attack(SEARCHES[name], seen), whole)
    assert len(steps) == needed + len(stops)  # the iteration in which each was killed, again


def test_the_table_covers_every_attack():
    assert sorted(SEARCHES | OTHERS) == registry.attack_names()


@pytest.mark.parametrize("name", OTHERS)
def test_attacks_that_do_not_search_start_anew(name, tmp_path):
    seen = victims(side=8)
    whole = attack(OTHERS[name], seen)
    with keeping(tmp_path, every=0):
        assert same(attack(OTHERS[name], seen), whole)
    assert list(tmp_path.iterdir()) == []


def test_ended_stacks_are_not_searched_again(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(search, "GROUP_FLOATS", 1)
    seen = victims()
    spec = "inverting:steps=60"
    whole = attack(spec, seen)
    needed = len(steps)
    with keeping(tmp_path, every=1e9):
        assert same(attack(spec, seen), whole)
        assert len(list(tmp_path.iterdir())) == 2
        _, second = sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)
        second.unlink()
        steps.clear()
        assert same(attack(spec, seen), whole)
        assert 0 < len(steps) < needed
        steps.clear()
        assert same(attack(spec, seen), whole)
        assert len(steps) == 0


def test_it_is_written_no_more_often_than_asked_and_nowhere_else(tmp_path, monkeypatch):
    now, writes = [0.0], []
    monkeypatch.setattr(keep.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(keep, "write_atomic", lambda path, write: writes.append(now[0]))

    def tick(step, of, text):
        now[0] = float(step)

    with keeping(tmp_path, every=60):
        attack("inverting:steps=200", victims(), tick)
    assert writes == [75.0, 150.0, 200.0]  # the last one as it ends
    attack("inverting:steps=200", victims(), tick)
    assert len(writes) == 3


@pytest.mark.parametrize("change", ["option", "class", "update", "labels", "model", "start", "mode"])
def test_another_question_starts_anew(change, tmp_path, steps):
    """Each change alone is another search, whose numbers are its own."""
    spec, seen, changed = "inverting:steps=60", victims()[:1], victims()[:1]
    o, other, first = changed[0], spec, 0
    if change == "option":
        other = spec + ",tv=0.02"
    elif change == "class":
        other = "sme:steps=60"
    elif change == "update":
        changed = [replace(o, update=o.update * 1.001)]
    elif change == "labels":
        changed = [replace(o, labels=torch.tensor([0, 1, 2, 3]))]
    elif change == "model":
        o.model[2] = torch.nn.Tanh()
    elif change == "mode":
        o.model.eval()
    else:
        first = 1

    def run(spec, seen, first=0, progress=lambda step, of, text: None):
        return registry.make_attack(spec).many(seen, [seeded(first)], progress)

    whole = run(other, changed, first)
    needed = len(steps)
    with keeping(tmp_path, every=0):
        with pytest.raises(KilledError):
            run(spec, seen, progress=killed_at(25))
        steps.clear()
        assert same(run(other, changed, first), whole)
    assert len(steps) == needed
    assert len(list(tmp_path.iterdir())) == 2


def flipped(content):
    """One byte of a tensor changed."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no zip" * 9, flipped]
)
def test_a_damaged_file_is_left_aside_with_one_warning(damage, tmp_path, steps):
    seen, spec = victims(), "dlg:steps=60,tolerance=0"
    whole = attack(spec, seen)
    needed = len(steps)
    with keeping(tmp_path, every=0):
        with pytest.raises(KilledError):
            attack(spec, seen, killed_at(25))
        (path,) = tmp_path.iterdir()
        path.write_bytes(damage(path.read_bytes()))
        steps.clear()
        with pytest.warns(UserWarning, match="cannot read .*: this search starts anew") as told:
            assert same(attack(spec, seen), whole)
    assert len(told) == 1
    assert len(steps) == needed


def test_only_its_own_files_are_removed(tmp_path):
    folder = tmp_path / "search"
    with keeping(folder):
        pass
    (folder / "a.kept").touch()
    (folder / ".a-x1.kept").touch()  # what a kill in the middle of a write leaves
    (folder / "mine.txt").touch()
    with keeping(folder):
        assert sorted(p.name for p in folder.iterdir()) == ["a.kept", "mine.txt"]
    forget(folder)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    forget(folder)
    assert not folder.exists()
    forget(folder)


PROCESS = """
import atexit, functools, runpy, sys
from fltoolkit.inversion import keep
from fltoolkit.inversion.adam import Adam

keep.keeping = functools.partial(keep.keeping, every=0.2)
step, taken = Adam.step, []
Adam.step = lambda self: (taken.append(1), step(self))[1]
atexit.register(lambda: print(len(taken), file=open("iterations", "w")))
sys.argv = ["attacks/inverting.py", *sys.argv[1:]]
runpy.run_module("attacks.inverting", run_name="__main__")
"""
"""`python -m attacks.inverting`, written down every 0.2 s, with its iterations counted."""


def numbers(folder):
    report = json.loads((folder / "report.json").read_text())
    return {k: v for k, v in report.items() if k not in ("command", "seconds", "victim_seconds")}


def test_killed_process_goes_on_where_it_was(tmp_path):
    """SIGKILL once the first checkpoint is there; what was done by then is not done again."""
    flags = ["--data", "digits", "--model", "mlp", "--batch", "2", "--victims", "2"]
    flags += ["--steps", "1500", "--option", "tolerance=0", "--option", "tv=0.1"]
    start = [sys.executable, "-c", PROCESS, *flags, "--out"]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert subprocess.run([*start, "whole"], **quiet).returncode == 0
    needed = int((tmp_path / "iterations").read_text())
    (tmp_path / "iterations").unlink()
    folder = tmp_path / "cut" / "search"
    running = subprocess.Popen([*start, "cut"], **quiet)
    while running.poll() is None:
        if any(folder.glob("[!.]*")):
            running.kill()
        time.sleep(0.002)
    assert running.returncode == -9
    assert not (tmp_path / "cut" / "report.json").exists()
    assert not (tmp_path / "iterations").exists()
    (path,) = folder.glob("[!.]*")
    done = len(torch.load(path, weights_only=True)["trace"]) - 1
    assert subprocess.run([*start, "cut", "--resume"], **quiet).returncode == 0
    assert done > 0
    assert int((tmp_path / "iterations").read_text()) == needed - done
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["reconstruction.png", "report.json"]


QUICK = ["--data", "digits", "--model", "mlp", "--steps", "20", "--out"]


def main(*flags):
    with pytest.raises(SystemExit) as ended:
        cli.attack_main("idlg", [*QUICK, *flags])
    return ended.value.code


def test_resume_needs_the_folder(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.attack_main("idlg", [*QUICK[:-1], "--resume"])
    assert ended.value.code == 2
    assert "error: out must be the folder of the run to resume, got None" in capsys.readouterr().err


def test_without_the_switch_what_was_kept_is_removed_and_with_it_used(tmp_path, steps, monkeypatch):
    from fltoolkit.report import figures

    draw, whole = figures.reconstruction_figure, str(tmp_path / "o")

    def fail(*arguments):
        raise KilledError

    for resume, expected in (([], 20), (["--resume"], 0), ([], 20)):
        steps.clear()
        monkeypatch.setattr(figures, "reconstruction_figure", fail)
        with pytest.raises(KilledError):
            cli.attack_main("idlg", [*QUICK, whole, *resume])
        assert len(steps) == expected
        assert len(list((tmp_path / "o" / "search").iterdir())) == 1
    monkeypatch.setattr(figures, "reconstruction_figure", draw)
    assert main(whole, "--resume") == 0
    assert not (tmp_path / "o" / "search").exists()
