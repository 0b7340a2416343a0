"""A user's own data: arrays in files, and PyTorch data sets."""

from __future__ import annotations

import io
import lzma
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from fltoolkit.audit import Scene, Stage
from fltoolkit.data import from_torch, load
from fltoolkit.errors import InputError
from fltoolkit.report.figures import show_image
from fltoolkit.training.federation import State, federate
from fltoolkit.training.recipe import Kitchen, Recipe

HAVE = Path(os.environ.get("FLTOOLKIT_DATA", ""))
GREY = np.arange(240, dtype=np.uint8).reshape(5, 3, 4, 4)
THREE = np.array([2, 0, 1, 1, 0])
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write(path, **content):
    """A .npz, or a .pt of tensors where tensors can hold it."""
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save({k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}, path)
    return f"tensors:{path}"


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_own_images_are_scaled_and_clients_numbered(tmp_path, suffix):
    client = np.array([30, -1, 7, 7, 30])
    spec = write(tmp_path / f"a{suffix}", x=GREY, y=THREE, client=client, x_test=GREY[:1], y_test=THREE[:1])
    data = load(spec)
    assert (data.name, data.num_classes, data.input_range) == (spec, 3, (0.0, 1.0))
    assert torch.equal(data.train.x, torch.from_numpy(GREY.astype(np.float32) / 255))
    assert (data.train.y.dtype, data.train.y.tolist()) == (torch.int64, THREE.tolist())
    assert (data.clients.dtype, data.clients.tolist()) == (torch.int64, [2, 0, 1, 1, 2])
    assert torch.equal(data.test.x, data.train.x[:1])


def test_own_numbers_are_kept_and_their_range_is_that_of_training(tmp_path):
    x = np.array([[-2.0, 0.5], [3.0, 1.0]], ">f8")
    named = np.array(["zoe", "al"])
    data = load(
        write(tmp_path / "a.npz", x=x, y=[0, 1], client=named, x_test=x + 9, y_test=[1, 0], num_classes=7)
    )
    assert (data.train.x.dtype, data.train.x.tolist()) == (torch.float32, x.tolist())
    assert (data.input_range, data.num_classes, data.clients.tolist()) == ((-2.0, 3.0), 7, [1, 0])
    flags = load(write(tmp_path / "b.pt", x=x > 0.7, y=np.array([0, 1])))
    assert (flags.train.x.dtype, flags.train.x.tolist()) == (torch.float32, [[0, 0], [1, 1]])


def test_own_tokens_are_left_as_ids_and_the_last_id_is_padding(tmp_path):
    x = np.array([[4, 2, 5], [1, 5, 5]])
    y = np.array([[2, 3, -100], [2, -100, -100]])
    data = load(write(tmp_path / "a.npz", x=x, y=y))
    assert data.tokens
    assert (data.train.x.tolist(), data.train.y.tolist()) == (x.tolist(), y.tolist())
    assert (data.num_classes, data.input_range) == (6, (0.0, 5.0))
    y[0, 2] = 1
    assert load(write(tmp_path / "b.npz", x=x, y=y)).num_classes == 7
    with pytest.raises(InputError, match=r"num_classes .* an integer >= 7, so that the last id is padding"):
        load(write(tmp_path / "c.npz", x=x, y=y, num_classes=6))
    data = load(write(tmp_path / "d.npz", x=x, y=[1, 0], x_test=x + 1, y_test=[0, 0]))
    assert (data.num_classes, data.input_range) == (2, (0.0, 6.0))
    with pytest.raises(InputError, match=r"y_test .* must hold a label, got none but -100"):
        load(write(tmp_path / "e.npz", x=x, y=y, x_test=x[:1], y_test=np.full((1, 3), -100)))


def labels_of_lines(shape, classes):
    """Classes of whole lines of ten tokens."""
    return nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(4 * shape[0], classes))


def test_lines_of_tokens_with_a_class_each_are_trained(tmp_path):
    x = np.random.default_rng(0).integers(0, 5, (40, 6)) + 5 * (np.arange(40) % 2)[:, None]
    spec = write(tmp_path / "a.npz", x=x, y=np.arange(40) % 2, x_test=x[:10], y_test=np.arange(10) % 2)
    recipe = Recipe(data=spec, model=f"{__name__}:labels_of_lines", clients=4, fraction=1.0, batch=2, lr=0.5)
    federation = Kitchen(recipe).federation([])
    start = State(federation.task.layout.row(federation.task.model))
    *_, last = federate(federation, start, 4)
    assert last.state.evaluated[-1][1].accuracy == 1.0
    with pytest.raises(InputError, match=r"must give 2 logits an example, got output shape \(2, 6, 2\)"):
        Kitchen(replace(recipe, model="charlstm")).federation([])


@pytest.mark.parametrize("shape", [(16,), (1, 2, 2), (3, 20), (2, 8, 8)])
def test_what_attacks_cannot_be_scored_on_is_refused_before_they_run(shape, tmp_path):
    spec = write(tmp_path / "a.npz", x=np.random.default_rng(0).random((60, *shape)), y=np.arange(60) % 3)
    with pytest.raises(InputError, match=r"data must hold images \[C, H, W\] with C = 1 or 3 and sides of 3"):
        Stage(Scene(attack="idlg", data=spec, model="mlp"))


def test_pictures_go_from_the_least_value_to_the_greatest():
    axis = plt.figure().add_subplot()
    for channels in (1, 3):
        ramp = torch.linspace(-1, 3, 5).view(1, 1, 5).expand(channels, 1, 5)
        show_image(axis, ramp, (-1.0, 3.0))
        drawn = np.asarray(axis.images[-1].get_array()).reshape(5, -1)
        assert np.allclose(drawn, np.linspace(0, 1, 5)[:, None])
        assert axis.images[-1].get_clim() == (0, 1)
    plt.close()


def test_an_id_for_a_label_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"greatest label .* must be an integer below 4194304, .*got 10{12}$"
    ):
        load(write(tmp_path / "a.npz", x=GREY, y=np.array([0, 1, 2, 3, 10**12])))


NAN = np.where(np.arange(240).reshape(GREY.shape) == 7, np.nan, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": None}, "must hold y, got x"),
        ({"x_test": GREY}, "must hold y_test, got x, y, x_test"),
        ({"clients": THREE}, r"unknown key of data '.*': 'clients'; did you mean 'client'\?"),
        ({"y": THREE[:4]}, "x and y of data '.*' must be of one length, got 5 and 4"),
        ({"x": NAN}, "x of data '.*' must be finite, got NaN or infinity in 1 places"),
        ({"x": GREY * 0.0}, "x of data '.*' must hold more than one value, got 0.0"),
        ({"x": GREY.astype(int) - 1}, r"x of data '.*' must be token ids >= 0 .* got -1"),
        ({"x": GREY[:, 0, 0, 0]}, r"x of data '.*' must be \[N, ...\] with N >= 1, got shape \(5,\)"),
        ({"x": GREY[:0], "y": THREE[:0]}, r"got shape \(0, 3, 4, 4\)"),
        ({"x": GREY * 1j}, "x of data '.*' must be real, got torch.complex128"),
        ({"x": np.array(["a"] * 5)}, "x of data '.*' must be numbers, got ndarray"),
        ({"y": THREE - 1}, "y of data '.*' must be >= 0, got -1"),
        ({"y": THREE / 1}, r"y of data '.*' must be integers \[N\] or \[N, T\], got torch.float64"),
        ({"y": THREE[:, None, None]}, r"must be integers .* of shape \(5, 1, 1\)"),
        ({"y": THREE[:, None]}, r"y of data '.*' must be \[N\], or \[N, T\] for tokens x \[N, T\], got x"),
        ({"x": np.ones((5, 2), int), "y": -np.ones((5, 2), int)}, r">= 0 \(or -100 for no label\), got -1"),
        ({"client": THREE[:3]}, r"client of data '.*' must be 5 integers or strings, got int64 \(3,\)"),
        ({"client": THREE / 2}, r"must be 5 integers or strings, got float64"),
        ({"num_classes": 2}, "num_classes of data '.*' must be an integer >= 3, one above .* got "),
        ({"num_classes": 3.5}, "num_classes .* must be an integer >= 3"),
        ({"x_test": GREY / 255, "y_test": THREE}, r"test of data '.*' must be like train, .*uint8.*float32"),
        ({"x_test": GREY[:, :1], "y_test": THREE}, r"must be like train, .* got .*\(1, 4, 4\)"),
        ({"x_test": GREY, "y_test": -THREE}, "y_test of data '.*' must be >= 0, got -2"),
    ],
)
def test_bad_tensors_are_refused(tmp_path, changes, message):
    content = {k: v for k, v in ({"x": GREY, "y": THREE} | changes).items() if v is not None}
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "a.npz", **content))


def test_unreadable_files_of_tensors_are_refused(tmp_path):
    for name, message in (("a.npz", "a readable .npz without pickles"), ("a.pt", "readable by torch.load")):
        for present in (False, True):
            if present:
                (tmp_path / name).write_bytes(b"nothing")
            with pytest.raises(InputError, match=rf"data file must be {message}, got '.*{name}'"):
                load(f"tensors:{tmp_path / name}")
    np.savez(tmp_path / "o.npz", x=np.array([Path()]), y=[0])
    torch.save({"x": Path()}, tmp_path / "o.pt")
    torch.save([1], tmp_path / "l.pt")
    for name, message in (("o.npz", "without pickles"), ("o.pt", "torch.load"), ("l.pt", "a dict of")):
        with pytest.raises(InputError, match=message):
            load(f"tensors:{tmp_path / name}")
    with pytest.raises(InputError, match=r"tensors:PATH must end in .npz or .pt, got 'a.csv'"):
        load("tensors:a.csv")


class Items(TorchDataset):
    """A map-style data set of the given items."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_torch_data_sets_become_ours():
    tensors = TensorDataset(torch.from_numpy(GREY), torch.from_numpy(THREE))
    data = from_torch(tensors, tensors, clients=["b", "a", "b", "b", "a"], name="mine", num_classes=4)
    assert torch.equal(data.test.x, torch.from_numpy(GREY.astype(np.float32) / 255))
    assert (data.name, data.num_classes, data.clients.tolist()) == ("mine", 4, [1, 0, 1, 1, 0])
    assert data.train.y.tolist() == THREE.tolist()
    assert from_torch(Items((GREY[0] / 1.0, 0), (GREY[1] / 1.0, 1))).input_range == (0.0, 95.0)
    data = from_torch(Items((GREY[0], 0, torch.tensor(9)), (GREY[1], np.int64(1), 4)))
    assert (data.clients.tolist(), data.test) == ([1, 0], None)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 51, [51]), ("1", 1, [255]), ("RGB", (1, 2, 3), [1, 2, 3]), ("RGBA", (1, 2, 3, 255), [1, 2, 3])],
)
def test_pil_images_are_channels_first(mode, colour, expected):
    x = from_torch(Items((Image.new(mode, (7, 5), colour), 0))).train.x
    assert x.shape == (1, len(expected), 5, 7)
    assert (x[0, :, 4, 6] * 255).round().tolist() == expected


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(GREY[0], 0)])

    def __len__(self):
        return 1


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (Stream(), {}, "train of data 'torch' must be a map-style torch data set.*, got Stream"),
        (7, {}, "must be a map-style torch data set.*, got int"),
        ({"x": GREY}, {}, "must be a map-style torch data set.*, got dict"),
        (Items(), {}, "train of data 'torch' must hold examples, got none"),
        (Items(GREY[0]), {}, r"must give \(x, y\) or \(x, y, client\), got \[1\] values"),
        (Items((GREY[0], 0), (GREY[0], 0, 1)), {}, r"got \[2, 3\] values"),
        (Items((GREY[0], 0), (GREY[0, :1], 0)), {}, r"x in train .* like the first, .* in item 1"),
        (Items((GREY[0], 0), (GREY[0] / 1, 0)), {}, r"float64\) in item 1"),
        (Items(("text", 0)), {}, "x in train .* must be tensors, NumPy arrays or PIL images, got str"),
        (Items((GREY[0], None)), {}, "y in train of data 'torch' must be numbers, got NoneType"),
        (Items((GREY[0], 0.5)), {}, "y of data 'torch' must be integers"),
        (Items((Image.new("I;16", (4, 4)), 0)), {}, "images of 8 bits, got a PIL image of mode 'I;16'"),
        (Items((GREY[0], 0, 1)), {"clients": [1]}, r"clients must be None .* got both"),
        (Items((GREY[0], 0, None)), {}, "client of data 'torch' must be 1 integers or strings, got object"),
        (
            Items((GREY[0], 0)),
            {"clients": [1, 2]},
            r"client .* must be 1 integers or strings, got int64 \(2,\)",
        ),
        (Items((GREY[0], 0)), {"clients": 1}, "client of data 'torch' must be integers or strings, got int"),
        (Items((GREY[0], 4)), {"num_classes": 3}, "num_classes of data 'torch' must be an integer >= 5"),
        (Items((GREY[0], 4)), {"test": Items()}, "test of data 'torch' must hold examples"),
    ],
)
def test_bad_torch_data_sets_are_refused(items, options, message):
    with pytest.raises(InputError, match=message):
        from_torch(items, **options)


def test_torch_data_set_of_a_users_function(tmp_path, monkeypatch):
    (tmp_path / "users_data.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\nfrom fltoolkit.data import load\n"
        "def one():\n    return TensorDataset(torch.eye(3), torch.arange(3))\n"
        "def two():\n    return one(), one()\n"
        "def ours():\n    return load('digits')\n"
        "def nothing():\n    pass\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    one, two = load("torch:users_data:one"), load("torch:users_data:two")
    assert (one.name, one.train.x.tolist(), one.test) == ("torch:users_data:one", torch.eye(3).tolist(), None)
    assert two.test.y.tolist() == [0, 1, 2]
    assert load("torch:users_data:ours").name == "digits"
    for spec, message in (
        ("torch", "data must be 'torch:module:function', got 'torch'"),
        ("tensors", "data must be 'tensors:PATH', got 'tensors'"),
        ("torch:./here:f", r"must name an importable module:function, got './here:f': "),
        ("torch:no_such:f", "must name an importable module:function, got 'no_such:f': No module"),
        ("torch:users_data", "must name an importable module:function, got 'users_data': "),
        ("torch:users_data:three", "got 'users_data:three': .* has no attribute 'three'"),
        ("torch:users_data:constant", "data 'users_data:constant' must be a function, got int"),
        ("torch:users_data:nothing", "must be a map-style torch data set, with len and items, got NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            load(spec)
    monkeypatch.delitem(sys.modules, "users_data")


@pytest.mark.skipif(
    not (HAVE / "cifar10" / "lossless-train.npy.xz").is_file(), reason="FLTOOLKIT_DATA has no cifar10/"
)
def test_real_cifar_is_in_published_order():
    """Against the part of CIFAR-10 that is at hand without loss: the order, colours and labels are right."""
    data, known = load("cifar10"), np.load(HAVE / "cifar10" / "labels.npz")
    assert (data.train.x.shape, data.test.x.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    for split, part in (("train", data.train), ("test", data.test)):
        assert part.y.tolist() == known[split].tolist()
        lossless = np.load(
            io.BytesIO(lzma.decompress((HAVE / "cifar10" / f"lossless-{split}.npy.xz").read_bytes()))
        )
        ours = part.x[known[f"lossless_{split}_index"].astype(int)].permute(0, 2, 3, 1) * 255
        error = (ours - torch.from_numpy(lossless)).abs().mean((1, 2, 3))
        assert len(error) in (4660, 846)
        assert 3 < error.mean() < 9
        assert error.max() < 15


@pytest.mark.skipif(not (HAVE / "femnist").is_dir(), reason="FLTOOLKIT_DATA has no femnist/")
def test_real_femnist_is_leafs_sample():
    data = load("femnist")
    assert (data.train.x.shape, data.test.x.shape) == ((14_708, 1, 28, 28), (1685, 1, 28, 28))
    sizes = torch.bincount(data.clients)
    assert (len(sizes), int(sizes.min()), int(sizes.max())) == (105, 4, 165)
    assert "105 writers" in data.note
    assert "22 test images" in data.note
    assert (data.train.x[:, 0, 0, 0].median(), data.train.x.min()) == (1.0, 0.0)
    assert int(data.train.y.max()) == 61
