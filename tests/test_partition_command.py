"""`python -m fltoolkit partition`: what clients hold, counted, drawn and written."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from fltoolkit import cli, data
from fltoolkit.commands.partition import count
from fltoolkit.data.dataset import Dataset
from fltoolkit.data.partition import partition
from fltoolkit.report import partition_figure
from fltoolkit.rng import stream
from fltoolkit.types import Examples

FILES = ["partition.json", "partition.png"]


def run(capsys, folder, *flags):
    """The numbers that the command prints with --json."""
    assert cli.main(["partition", *flags, "--json", "--out", str(folder)]) == 0
    return json.loads(capsys.readouterr().out)


def slow_distance(part, y, classes):
    """Total variation as half the sum of differences of shares, one example and one class at a time."""
    mine, everyone = Counter(int(y[i]) for i in part), Counter(int(c) for c in y)
    return sum(abs(mine[c] / len(part) - everyone[c] / len(y)) for c in range(classes)) / 2


@pytest.mark.parametrize("spec", ["iid", "shards", "dirichlet:alpha=0.1", "unbalanced"])
def test_numbers_are_those_of_a_slow_count(spec, tmp_path, capsys):
    report = run(capsys, tmp_path, "--partition", spec, "--clients", "13", "--seed", "3")
    y = data.load("digits").train.y.numpy()
    parts = partition(spec, y, 13, stream(3, "partition"))
    assert report["sizes"] == [len(p) for p in parts]
    assert report["counts"] == [[sum(y[i] == c for i in p) for c in range(10)] for p in parts]
    expected = [slow_distance(p, y, 10) for p in parts]
    assert report["distance"] == pytest.approx(expected)
    assert report["mean_distance"] == pytest.approx(np.mean(expected))
    assert (report["clients"], report["examples"], report["dealt"]) == (13, 1437, 1437)
    assert report["whole"] == [sum(y == c) for c in range(10)]


def test_clients_are_those_that_train_has(tmp_path, capsys):
    deal = ["--data", "digits", "--partition", "unbalanced:sigma=1.5", "--clients", "12", "--seed", "5"]
    quick = ["--fraction", "1", "--rounds", "1", "--epochs", "1", "--model", "softmax"]
    assert cli.main(["train", *deal, *quick, "--out", str(tmp_path / "t")]) == 0
    capsys.readouterr()
    line = json.loads((tmp_path / "t" / "metrics.jsonl").read_text().splitlines()[0])
    assert run(capsys, tmp_path / "p", *deal)["sizes"] == [c["examples"] for c in line["clients"]]


def test_a_path_is_no_formula(tmp_path, capsys):
    np.savez(tmp_path / r"$\foo$.npz", x=np.random.default_rng(0).random((4, 3)), y=np.arange(4) % 2)
    run(capsys, tmp_path / "p", "--data", rf"tensors:{tmp_path}/$\foo$.npz", "--clients", "2")
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == FILES


def test_distance_ends_at_0_and_nearly_1():
    y = np.repeat(np.arange(4), 25)
    alike = count([np.arange(i, 100, 25) for i in range(25)], y, 4)
    apart = count(np.split(np.arange(100), 4), y, 4)
    assert alike.distance.tolist() == [0.0] * 25
    assert apart.distance.tolist() == [0.75] * 4
    assert (alike.classes.tolist(), apart.classes.tolist()) == ([4] * 25, [1] * 4)


def test_table_and_files_are_said_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["partition", "--partition", "shards:per_client=1", "--clients", "10"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("partition-")
    assert sorted(p.name for p in folder.iterdir()) == FILES
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line.split() for line in captured.out.splitlines()]
    assert captured.out.startswith("10 clients, 1,437 of 1,437 examples dealt\n")
    assert ["a", "client's", "min", "median", "max", "mean"] in lines
    assert ["examples", "143", "144", "144", "143.7"] in lines
    (classes,) = [line for line in lines if line[0] == "classes"]
    assert classes[1] == "1"
    assert float(classes[3]) <= 3
    for name in FILES:
        assert f"{folder.relative_to(tmp_path)}/{name}" in captured.out
    report = json.loads((folder / "partition.json").read_text())
    assert report["seed"] == 0
    flags = {"data": "digits", "partition": "shards:per_client=1", "clients": 10, "seed": 0}
    assert report["options"] == flags
    assert report["versions"]["fltoolkit"]
    assert "command" in report


def test_json_is_one_object_alone_on_stdout(tmp_path, capsys):
    assert cli.main(["partition", "--clients", "5", "--json", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "partition.json").read_text())
    assert "5 clients, 1,437 of 1,437 examples dealt" in captured.err


def test_medians_between_two_numbers_are_not_rounded_away(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name: of_roles(classes=3))
    assert cli.main(["partition", "--partition", "iid", "--clients", "8", "--out", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["examples", "7", "7.5", "8", "7.5"] in lines


def of_roles(classes=None):
    """60 examples of 6 natural clients; classes None: labels are lines of 4 tokens."""
    y = torch.zeros(60, 4, dtype=torch.int64) if classes is None else torch.arange(60) % classes
    train = Examples(torch.zeros(60, 1, 2, 2), y)
    return Dataset("roles", train, None, classes or 9, clients=torch.arange(60) // 10, note="a part only")


def test_tokens_have_sizes_and_no_classes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name: of_roles())
    assert cli.main(["partition", "--partition", "natural", "--clients", "4", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 clients, 40 of 60 examples dealt" in out
    assert "no classes to count" in out
    assert "\nclasses" not in out
    assert "\nnote: a part only\n" in out
    report = json.loads((tmp_path / "partition.json").read_text())
    assert report["note"] == "a part only"
    assert report["sizes"] == [10] * 4
    assert [report[k] for k in ("counts", "whole", "distance", "mean_distance")] == [None] * 4
    assert Image.open(tmp_path / "partition.png").size[1] == 450


def test_distance_is_to_all_the_data_also_where_part_of_it_is_dealt(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name: of_roles(classes=60))
    report = run(capsys, tmp_path, "--partition", "natural", "--clients", "2")
    assert report["dealt"] == 20
    assert report["distance"] == pytest.approx([(10 * (1 / 10 - 1 / 60) + 50 / 60) / 2] * 2)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw counts `[K, classes]` and look at the figure instead of its file."""
    seen = []
    monkeypatch.setattr(partition_figure, "save", lambda figure, path: seen.append(figure))

    def draw(counts):
        partition_figure.partition_figure(tmp_path / "f.png", counts.sum(1), counts, "title")
        return seen[-1]

    yield draw
    for figure in seen:
        plt.close(figure)


def test_areas_of_few_clients_are_in_proportion_and_fit_their_cells(drawn):
    counts = np.array([[400, 0, 100], [0, 200, 0]])
    figure = drawn(counts)
    main, bars, key = figure.axes
    (dots,) = main.collections
    assert dots.get_offsets().tolist() == [[0, 0], [0, 2], [1, 1]]
    assert dots.get_sizes() / dots.get_sizes().max() == pytest.approx([1, 0.25, 0.5])
    assert [b.get_height() for b in bars.patches] == [500, 200]
    assert [t.get_text() for t in key.get_legend().get_texts()] == ["40", "200", "400"]
    for clients, classes in ((40, 10), (3, 40), (2, 2)):
        figure = drawn(np.full((clients, classes), 9))
        main = figure.axes[0]
        figure.draw_without_rendering()
        box = main.get_window_extent()
        cell = min(box.width / clients, box.height / classes) * 72 / figure.dpi
        assert 0.4 * min(cell, 40) < np.sqrt(main.collections[0].get_sizes().max()) < cell


@pytest.mark.parametrize(("clients", "classes"), [(41, 3), (3, 62), (500, 62)])
def test_many_clients_or_classes_become_colours(drawn, clients, classes):
    counts = np.random.default_rng(0).integers(0, 5, (clients, classes))
    counts[:, 0] = 7
    main, bars, key = drawn(counts).axes
    (image,) = main.images
    assert image.get_array().filled(0).tolist() == counts.T.tolist()
    assert (image.get_array().mask == (counts.T == 0)).all()
    assert image.get_clim() == (0, 7)
    assert key.get_ylabel() == "examples (white: none)"
    assert len(bars.patches) == (1 if clients > partition_figure.MOST_BARS else clients)
    assert main.get_ylim() == (classes - 0.5, -0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clients", "0"], "error: clients must be >= 1, got 0"),
        (["--clients", "1438"], "error: clients must leave each part an example, got 1438 parts of 1437"),
        (["--partition", "shard"], "error: unknown partition 'shard'; did you mean 'shards'?"),
        (["--partition", "dirichlet:alpha=-1"], "error: alpha must be a finite number > 0, got -1.0"),
        (["--partition", "natural"], "error: partition 'natural' needs data that knows its clients"),
        (["--data", "digit"], "error: unknown data set 'digit'; did you mean 'digits'?"),
        (["--seed", "-1"], "error: seed must be >= 0, got -1"),
        (["--out", "/dev/null/x"], "error: out must be a folder that can be written"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["partition", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_tokens_cannot_be_dealt_by_class(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name: of_roles())
    assert cli.main(["partition", "--partition", "shards", "--clients", "3", "--out", str(tmp_path)]) == 2
    assert "'shards' needs one label an example, got labels of shape (60, 4)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
