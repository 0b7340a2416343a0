"""A grid runs to the same numbers however it is run, and its points say what its victims do."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from pyarrow import csv, parquet

from fltoolkit import cli
from fltoolkit.audit import make_threat
from fltoolkit.errors import InputError
from fltoolkit.scoring import score
from fltoolkit.tradeoff import engines, read, run
from fltoolkit.tradeoff.attacking import Vantage, _numbers, _renumbered
from fltoolkit.tradeoff.grid import grid_of
from fltoolkit.tradeoff.jobs import Attacking, Training
from fltoolkit.tradeoff.pictures import side_by_side
from fltoolkit.tradeoff.result import MOST_DB, _share, largest_epsilon, mark_front, seen_epsilon, strongest
from fltoolkit.tradeoff.running import attacks_on, jobs_of, training_of
from fltoolkit.tradeoff.training import kitchen, replay
from fltoolkit.training import federation as fed
from fltoolkit.types import Reconstruction

SMALL = {
    "seeds": [0, 1],
    "federation": {
        "data": "digits",
        "model": "softmax",
        "clients": 60,
        "fraction": 0.1,
        "epochs": 1,
        "batch": "inf",
        "lr": 0.5,
        "rounds": 5,
        "equal_weights": True,
    },
    "leakage": {
        "attacks": ["idlg:adapt=true,steps=3,restarts=1", "isolation:inner=idlg,steps=3"],
        "victims": 2,
    },
    "defense": [
        {"name": "top-k", "stack": ["topk:fraction={}"], "values": [0.1]},
        {
            "name": "shared noise",
            "stacks": [["clip:norm=1", "gaussian:placement=server,noise_multiplier=1"]],
        },
        {"name": "secure sum", "stacks": [["secagg:threshold=0.1"]]},
    ],
}
GRID = grid_of(SMALL)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    return folder, run(GRID, folder)


def without_times(content):
    """A result less what a clock said."""
    points = [{k: v for k, v in p.items() if k != "seconds"} for p in content["points"]]
    return {**content, "points": points, "seconds": 0, "command": ""}


def point(content, label, threat):
    return next(p for p in content["points"] if (p["label"], p["threat"]) == (label, threat))


def test_default_grid_is_one_that_can_run():
    grid = read("default")
    grid.check()
    assert {"none", "clip", "client noise", "DP-SGD", "secure sum"} <= {c.name for c in grid.curves}


def test_values_fill_the_stack_and_no_defense_is_always_there():
    assert [c.name for c in GRID.curves] == ["none", "top-k", "shared noise", "secure sum"]
    assert GRID.curves[0].stacks == ((),)
    assert GRID.curves[1].stacks == (("topk:fraction=0.1",),)
    assert GRID.attacked == (1, 3, 5)
    assert GRID.recipe.batch is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, "unknown key of the grid 'sedes'; did you mean 'seeds'"),
        ({"federation": {"datta": "digits"}}, "unknown key of \\[federation\\] 'datta'"),
        ({"federation": {"lr": "fast"}}, "lr of \\[federation\\] must be like 0.5, got 'fast'"),
        ({"federation": {"clients": 1.5}}, "clients of \\[federation\\] must be a whole number, got 1.5"),
        ({"federation": {"equal_weights": 1}}, "equal_weights of \\[federation\\] must be"),
        ({"federation": {"rounds": 0}}, "rounds of the federation must be >= 1, got 0"),
        ({"federation": {"data": "photos"}}, "data must have a test part"),
        ({"leakage": {"rounds": [99]}}, "rounds to attack must be from 1 to 30, got 99"),
        ({"leakage": {"rounds": ["soon"]}}, "rounds to attack must be a whole number, got 'soon'"),
        ({"leakage": {"victims": 0}}, "victims must be >= 1"),
        ({"leakage": {"threats": ["sever"]}}, "unknown threat model 'sever'"),
        ({"leakage": {"attacks": ["idgl"]}}, "unknown attack 'idgl'"),
        ({"leakage": {"attacks": []}}, "attacks must be at least one"),
        ({"leakage": {"attacks": "idlg"}}, "attacks must be a list, got 'idlg'"),
        ({"leakage": {"threshold_db": math.inf}}, "threshold_db must be a finite number, got inf"),
        ({"seeds": 3}, "seeds must be a list, got 3"),
        ({"seeds": [0, -1]}, "seed must be >= 0, got -1"),
        ({"delta": "x"}, "delta must be a number, got 'x'"),
        ({"defense": {"name": "x"}}, "defense must be a list"),
        ({"seeds": [1, 1]}, "seeds must be all different"),
        ({"delta": 2.0}, "delta must be between 0 and 1"),
        ({"defense": [{"name": "x", "stack": ["clip:nrom=1"]}]}, "unknown option of defense clip 'nrom'"),
        ({"defense": [{"name": "x", "stack": ["clip"], "values": [1]}]}, "must hold {} where values go"),
        ({"defense": [{"name": "x", "stack": "clip:norm=1"}]}, "stack must be a list of defenses"),
        ({"defense": [{"name": "x"}, {"name": "x"}]}, "names of defenses must be all different"),
        ({"defense": [{"stack": []}]}, "name of a \\[\\[defense\\]\\] must be a text, got None"),
    ],
)
def test_impossible_grids_stop_before_work(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr("fltoolkit.tradeoff.running.engine", None)
    with pytest.raises(InputError, match=message):
        run(grid_of(change), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a = = 1", "grid must be TOML"), (None, "grid must be a TOML file or 'default'")],
)
def test_a_file_that_is_no_grid_is_named(content, message, tmp_path):
    path = tmp_path / "grid.toml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read(path)


def test_played_again_a_round_is_the_round_that_happened(tmp_path):
    stack = ("topk:fraction=0.1", "clip:norm=1", "gaussian:placement=server,noise_multiplier=1")
    training = training_of(GRID, stack, 1)
    states = torch.load(_file(training.run({}), ".pt", tmp_path), weights_only=True)
    federation = kitchen(training.recipe).federation(stack)
    live = {}

    class Watch:
        def wants(self, number):
            return True

        def __call__(self, transcript):
            live[transcript.updates.round] = transcript

    start = fed.State(federation.task.layout.row(federation.task.model))
    list(fed.federate(federation, start, GRID.rounds, Watch()))
    for number in GRID.attacked:
        again = replay(federation, states[str(number)], number).transcript
        assert torch.equal(again.messages, live[number].messages)
        assert torch.equal(again.aggregate, live[number].aggregate)
        assert again.updates.clients == live[number].updates.clients


def _file(files, ending, folder):
    name = next(n for n in files if n.endswith(ending))
    (folder / name).write_bytes(files[name])
    return folder / name


def test_accuracy_and_epsilon_are_those_of_the_command_that_trains(small, tmp_path, capsys):
    f, (_, content) = SMALL["federation"], small
    defenses = SMALL["defense"][1]["stacks"][0]
    flags = [w for d in defenses for w in ("--defense", d)]
    values = [w for k, v in f.items() if k != "equal_weights" for w in (f"--{k.replace('_', '-')}", str(v))]
    rest = ["--equal-weights", "--seed", "1", "--json", "--out", str(tmp_path)]
    code = cli.main(["train", *values, *flags, *rest])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    found = point(content, " + ".join(defenses), "aggregate")
    assert found["accuracy"]["values"][1] == report["accuracy"][-1]["value"]
    assert found["epsilon"]["value"] == pytest.approx(report["epsilon"]["aggregate"])
    assert point(content, " + ".join(defenses), "server")["epsilon"]["value"] is None


def test_every_pair_of_attack_and_threat_that_can_be_is_run_once(small):
    folder, content = small
    ids = [j.id for j in jobs_of(GRID)]
    assert len(set(ids)) == len(ids)
    assert {p.stem for p in (folder / "cells").glob("*.json")} == set(ids)
    threats = {p["label"]: [] for p in content["points"]}
    for p in content["points"]:
        threats[p["label"]].append(p["threat"])
    assert threats.pop("secagg:threshold=0.1") == ["server", "aggregate", "isolating"]
    assert all(t == ["server", "aggregate"] for t in threats.values())


def test_table_holds_a_row_for_each_victim_and_says_the_same_twice(small):
    folder, content = small
    rows = parquet.read_table(folder / "table.parquet").to_pylist()
    assert csv.read_csv(folder / "table.csv").num_rows == len(rows)
    keys = [tuple(r[k] for k in ("stack", "seed", "threat", "attack", "round", "victim")) for r in rows]
    assert len(set(keys)) == len(keys) == 2 * 3 * 2 * (4 * 2 + 1)
    some = [r for r in rows if r["stack"] == "none" and r["threat"] == "server" and r["round"] == 1]
    found = point(content, "none", "server")
    first = next(a for a in found["attacks"] if a["round"] == 1)
    assert first["n"] == len(some) == 4
    assert first["psnr_db"]["mean"] == pytest.approx(np.mean([r["psnr_db"] for r in some]))


def test_a_secure_sum_shows_one_sum_and_isolation_breaks_a_low_threshold(small):
    rows = parquet.read_table(small[0] / "table.parquet").to_pylist()
    images = {"server": set(), "isolating": set()}
    for r in rows:
        if r["stack"].startswith("secagg") and r["threat"] in images:
            images[r["threat"]].add(r["images"])
    assert min(images["server"]) > 6 * 20
    assert max(images["isolating"]) <= 24


def test_what_is_there_is_not_run_again(small, monkeypatch):
    folder, content = small
    lost = training_of(GRID, (), 0).id
    (folder / "cells" / f"{lost}.json").unlink()
    ran = []
    original = Training.run
    monkeypatch.setattr(Training, "run", lambda self, *a: ran.append(self.id) or original(self, *a))
    monkeypatch.setattr(Attacking, "run", None)
    again = run(GRID, folder)
    assert ran == [lost]
    assert without_times(again) == without_times(content)


def test_a_grid_that_is_stopped_goes_on_where_it_was(small, tmp_path):
    def stop(done, of, text):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(GRID, tmp_path, report=stop)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 5
    counts = []
    content = run(GRID, tmp_path, report=lambda done, of, text: counts.append((done, of)))
    assert counts[0] == (6, len(list(jobs_of(GRID))))
    assert without_times(content) == without_times(small[1])


def test_a_training_that_is_killed_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    training = training_of(GRID, ("topk:fraction=0.1",), 0)
    whole = json.loads(training.run({})[f"{training.id}.json"])
    monkeypatch.setattr("fltoolkit.tradeoff.training.SAVE_SECONDS", -1.0)
    original, rounds = fed.federate, []

    def killed(*args):
        for step in original(*args):
            if len(rounds) == 3:
                raise KeyboardInterrupt
            rounds.append(step.state.round)
            yield step

    monkeypatch.setattr("fltoolkit.tradeoff.training.fed.federate", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run({}, tmp_path)
    monkeypatch.setattr("fltoolkit.tradeoff.training.fed.federate", original)
    begun = []
    monkeypatch.setattr(
        "fltoolkit.tradeoff.training.fed.federate", lambda f, s, n: begun.append(s.round) or original(f, s, n)
    )
    resumed = training.run({}, tmp_path)
    assert begun == [3]
    for key in ("accuracy", "epsilon", "bytes", "rounds"):
        assert json.loads(resumed[f"{training.id}.json"])[key] == whole[key]
    assert list(tmp_path.iterdir()) == []


def test_processes_give_the_numbers_of_one_and_survive_the_death_of_one(small, tmp_path):
    killed = []

    def kill(done, of, text):
        if done >= 2 and not killed:
            pool = place.pool
            victim = next(iter(pool._processes.values()))
            victim.kill()
            killed.append(victim.pid)

    place = engines.Processes(2, tmp_path)
    content = _run_on(place, tmp_path, kill)
    assert killed
    assert without_times(content) == without_times(small[1])


def _run_on(place, folder, report, monkeypatch=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fltoolkit.tradeoff.running.engine", lambda *a: place)
        return run(GRID, folder, report=report)


def test_a_job_is_begun_though_the_pool_broke_before(tmp_path):
    place = engines.Processes(1, tmp_path)
    place.pool.submit(os._exit, 1).exception()
    training = training_of(GRID, (), 0)
    place.submit(training, {})
    ((job, files),) = place.done()
    place.close()
    assert job == training
    assert f"{training.id}.json" in files


def test_a_process_that_always_dies_ends_the_run(tmp_path):
    place = engines.Processes(1, tmp_path)
    place.running = {}
    with pytest.raises(RuntimeError, match="4 processes died in train-"):
        place._begin_again([(training_of(GRID, (), 0), {}, engines.TRIES)])
    place.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "threads"], "engine must be one of"),
        (["--workers", "0"], "workers must be >= 1"),
        (["--address", "auto"], "address must be left out without --engine ray"),
        (["--show"], "out must be the folder of a finished run"),
    ],
)
def test_bad_flags_end_in_one_sentence(flags, message, tmp_path, capsys):
    assert cli.main(["tradeoff", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_command_prints_the_points_and_shows_them_again(small, tmp_path, capsys):
    folder, content = small
    assert cli.main(["tradeoff", "--show", "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    best = point(content, "none", "server")["leak_db"]["mean"]
    assert f"{best:.1f} [" in shown
    assert shown.count("isolating") == 1


def test_looks_under_an_aggregate_are_of_different_cohorts(tmp_path):
    training = training_of(GRID, (), 0)
    states = torch.load(_file(training.run({}), ".pt", tmp_path), weights_only=True)
    place = kitchen(training.recipe)
    federation = place.federation(())
    here = Vantage(federation, make_threat("aggregate"), states["3"], 3, place.data)
    looks = here.watched(3)
    first = replay(federation, states["3"], 3).transcript
    assert torch.equal(looks[0].observation.update, first.aggregate)
    assert len({float(each.observation.update.sum()) for each in looks}) == 3
    assert all(torch.equal(each.observation.params, states["3"]["params"]) for each in looks)


def test_memory_of_clients_follows_them_to_their_new_numbers():
    one = torch.ones(1)
    memory = {("topk", "residual", 7): 7 * one, ("topk", "residual", 9): 9 * one}
    memory["adaptive-clip", "norm"] = one
    found = _renumbered(memory, [3, 7])
    assert set(found) == {("topk", "residual", 1), ("adaptive-clip", "norm")}
    assert found["topk", "residual", 1] == 7


def victims(values, trivial=10.0):
    return [{"psnr_db": v, "gain_db": v - trivial} for v in values]


def test_leak_is_that_of_the_strongest_pair_within_its_bounds():
    pairs = {("a", 1): victims([5.0, 7.0]), ("b", 1): victims([20.0, 100.0]), ("b", 9): victims([12.0, 14.0])}
    best, leak = strongest(pairs)
    assert best == ("b", 1)
    assert leak["mean"] == (20 + MOST_DB) / 2
    assert leak["ci95"][1] == MOST_DB
    assert strongest({("a", 1): victims([5.0, 7.0])})[1]["mean"] == 10
    assert strongest({}) == (None, None)


def test_interval_of_the_leak_holds_the_largest_true_mean_as_often_as_it_says():
    rng, covered, repeats = np.random.default_rng(0), 0, 400
    truth = [18.0, 20.0, 20.0, 19.5, 15.0, 20.0]
    for _ in range(repeats):
        pairs = {("a", i): victims(rng.normal(t, 3, 12)) for i, t in enumerate(truth)}
        low, high = strongest(pairs)[1]["ci95"]
        covered += low <= max(truth) <= high
    assert covered / repeats >= 0.95
    naive = math.sqrt(0.95 * 0.05 / repeats)
    assert covered / repeats <= 1 - 0.05 / len(truth) + 4 * naive


def test_front_is_what_an_obvious_search_finds():
    rng = np.random.default_rng(1)
    points = [
        {"threat": t, "accuracy": {"mean": float(a)}, "leak_db": {"mean": float(d)}}
        for t in ("server", "aggregate")
        for a, d in zip(rng.integers(5, 9, 30) / 10, rng.integers(10, 20, 30), strict=True)
    ]
    points.append({"threat": "server", "accuracy": {"mean": 1.0}, "leak_db": None})
    mark_front(points)
    for p in points:
        if p["leak_db"] is None:
            assert not p["pareto"]
            continue
        a, d = p["accuracy"]["mean"], p["leak_db"]["mean"]
        others = [
            (q["accuracy"]["mean"], q["leak_db"]["mean"])
            for q in points
            if q["threat"] == p["threat"] and q["leak_db"] is not None
        ]
        better = [o for o in others if o != (a, d) and o[0] >= a and o[1] <= d]
        assert p["pareto"] == (not better)


def test_pictures_keep_a_private_image_only_where_it_is_another_one():
    seen = [
        {"images": [{"truth": "A", "png": "a"}, {"truth": "B", "png": "b"}]},
        {"images": [{"truth": "A", "png": "x"}, {"truth": "C", "png": "c"}]},
    ]
    found = side_by_side(seen)
    assert found["victims"] == [{"png": "A"}, {"png": "B"}]
    assert [sorted(i) for r in found["recovered"] for i in r["images"]] == [["png"]] * 3 + [["png", "truth"]]


def test_attacks_with_an_adversary_of_their_own_need_a_secure_sum():
    assert all(j.threat is not None for j in attacks_on(GRID, training_of(GRID, (), 0)))
    assert [j.threat for j in attacks_on(GRID, training_of(GRID, ("secagg",), 0))].count(None) == 1


def test_a_victim_is_recovered_where_its_best_image_is():
    data = kitchen(GRID.recipe).data
    truth = data.train.take(slice(0, 2))
    guess = Reconstruction(torch.stack([truth.x[0], 1 - truth.x[1]]), truth.y, 0.0)
    scored = score(guess, truth, data.train.x.mean(0), data.input_range, data.num_classes)
    numbers = _numbers(scored, 30.0)
    assert numbers["recovered"]
    assert numbers["psnr_db"] == pytest.approx(float(scored.psnr.mean()))
    assert numbers["images"] == 2
    assert not _numbers(scored, 101.0)["recovered"]


def test_messages_are_looked_at_by_as_many_victims_as_the_grid_asks_for(tmp_path):
    training = training_of(GRID, (), 0)
    states = torch.load(_file(training.run({}), ".pt", tmp_path), weights_only=True)
    place = kitchen(training.recipe)
    here = Vantage(place.federation(()), make_threat("server"), states["1"], 1, place.data)
    messages = replay(here.federation, states["1"], 1).transcript.messages
    looks = here.watched(4)
    assert [torch.equal(o.observation.update, m) for o, m in zip(looks, messages, strict=False)] == [True] * 4
    assert len(here.watched(99)) == len(messages) == 6


@pytest.mark.parametrize(
    ("threat", "value", "view", "unit"),
    [
        ("server", 3.0, "message", "client"),
        ("aggregate", 2.0, "aggregate", "client"),
        ("isolating", 9.0, "exposed", "client"),
        ("patient", 9.0, "exposed", "client"),
    ],
)
def test_an_adversary_has_the_epsilon_of_what_it_sees(threat, value, view, unit):
    epsilons = {"client": {"message": 3.0, "aggregate": 2.0, "exposed": 9.0}}
    found = seen_epsilon(threat, epsilons, 1e-5)
    assert found == {"value": value, "view": view, "delta": 1e-5, "unit": unit}


def test_epsilon_of_examples_counts_where_clients_have_none_and_the_largest_of_all_seeds():
    client = {"message": None, "aggregate": None, "exposed": None}
    assert seen_epsilon("server", {"client": client, "example": {"message": 5.0}}, 1e-5)["unit"] == "example"
    assert seen_epsilon("server", {"client": client}, 1e-5)["value"] is None
    seeds = [
        {"example": {"message": 5.0, "aggregate": 1.0}},
        {"example": {"message": 7.0, "aggregate": None}},
    ]
    assert largest_epsilon(seeds) == {"example": {"message": 7.0, "aggregate": None}}
    assert largest_epsilon([{}, seeds[0]]) == {"example": {"message": None, "aggregate": None}}


def test_a_message_that_lost_its_cover_has_a_larger_epsilon(small):
    stack = ("clip:norm=1", "gaussian:placement=client,noise_multiplier=1", "secagg")
    files = training_of(GRID, stack, 0).run({})
    found = json.loads(next(iter(v for k, v in files.items() if k.endswith(".json"))))["epsilon"]["client"]
    assert found["message"] < found["exposed"]


def test_interval_of_a_share_ends_where_shares_do():
    assert _share([0.1, 0.9])["ci95"] == [0.0, 1.0]
    assert _share([0.5])["ci95"] is None
    assert _share([0.50, 0.51])["ci95"][0] > 0.4


def test_table_and_points_agree_on_what_a_training_gave(small):
    folder, content = small
    rows = parquet.read_table(folder / "table.parquet").to_pylist()
    for p in content["points"]:
        mine = [r for r in rows if r["stack"] == p["label"] and r["threat"] == p["threat"]]
        assert mine
        for r in mine:
            assert r["accuracy"] == p["accuracy"]["values"][GRID.seeds.index(r["seed"])]
            assert r["delta"] == p["epsilon"]["delta"] == GRID.delta
            assert r["test_examples"] == 360
        assert np.mean([r["bytes_up"] for r in mine]) == pytest.approx(p["bytes"]["up"])
        if p["threat"] == "aggregate":
            assert {r["epsilon_aggregate"] for r in mine} == {p["epsilon"]["value"]}
        if p["threat"] == "server":
            assert {r["epsilon_message"] for r in mine} == {p["epsilon"]["value"]}
