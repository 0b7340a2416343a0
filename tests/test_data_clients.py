"""CIFAR-10 and FEMNIST: small files of every format, bad ones, and the real ones."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fltoolkit.data import load
from fltoolkit.data.cifar import read_batch
from fltoolkit.data.partition import partition
from fltoolkit.errors import InputError

HAVE = Path(os.environ.get("FLTOOLKIT_DATA", ""))
GREY = np.arange(240, dtype=np.uint8).reshape(5, 3, 4, 4)
THREE = np.array([2, 0, 1, 1, 0])
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder as FLTOOLKIT_DATA, and no network."""

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setenv("FLTOOLKIT_DATA", str(tmp_path))
    monkeypatch.setattr("pooch.retrieve", offline)
    for name in ("cifar10", "femnist"):
        (tmp_path / name).mkdir()
    return tmp_path


def python2_batch(x, labels):
    """A batch as the published ones are: in the opcodes of Python 2 and the names of its NumPy."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += b"M" + struct.pack("<H", len(x)) + b"M\x00\x0c\x86"
    array += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"\x89T" + struct.pack("<i", x.size) + x.tobytes() + b"tb"
    return b"\x80\x02}(U\x06labels](" + b"".join(b"K%c" % y for y in labels) + b"eU\x04data" + array + b"u."


def small_batches(seed=0, size=2):
    """{batch name: content}, and all their images and labels in order."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (6, size, 3, 32, 32), dtype=np.uint8)
    y = rng.integers(0, 10, (6, size))
    files = {n: python2_batch(a, b) for n, a, b in zip(BATCHES, x, y, strict=True)}
    return files, x.reshape(-1, 3, 32, 32), y.ravel()


def write_folder(root, files):
    folder = root / "cifar10" / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in sorted(files.items(), key=lambda item: item[0][::-1]):
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def assert_cifar(data, x, y, test):
    assert data.train.x.dtype == torch.float32
    assert torch.equal(torch.cat([data.train.x, data.test.x]), torch.from_numpy(x.astype(np.float32) / 255))
    assert torch.cat([data.train.y, data.test.y]).tolist() == y.tolist()
    assert (len(data.test), data.num_classes, data.note) == (test, 10, "")


def test_cifar_batches_come_in_published_order_and_the_folder_before_the_archive(root):
    files, x, y = small_batches()
    archive = root / "cifar10" / "cifar-10-python.tar.gz"
    write_jpegs(root, [0], [0])
    write_tar(archive, files)
    assert_cifar(load("cifar10"), x, y, test=2)
    files, x, y = small_batches(seed=1, size=3)
    write_folder(root, files)
    assert_cifar(load("cifar10"), x, y, test=3)


def test_cifar_nowhere_is_downloaded_with_its_checksum(root, tmp_path, monkeypatch):
    files, x, y = small_batches()
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash, path.name))
        return str(write_tar(tmp_path / fname, files))

    with pytest.raises(
        InputError, match=r"data 'cifar10' must be at hand .*no network. Set FLTOOLKIT_DATA to"
    ):
        load("cifar10")
    monkeypatch.setattr("pooch.retrieve", retrieve)
    assert_cifar(load("cifar10"), x, y, test=2)
    url, md5 = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
    assert asked == [(url, f"md5:{md5}", "cifar10")]


def test_malicious_batch_is_refused_and_not_executed(root):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(root / "harm"),)

    content = pickle.dumps({"data": Evil(), "labels": []})
    pickle.loads(content)
    (root / "harm").rmdir()
    files, _, _ = small_batches()
    write_folder(root, files | {"test_batch": content})
    with pytest.raises(InputError, match=r"py: test_batch': UnpicklingError: (posix|nt)\.mkdir is refused"):
        load("cifar10")
    assert not (root / "harm").exists()


X = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python2_batch(X, [1, 2])[:-40], "got 'here': "),
        (b"no pickle", "got 'here': UnpicklingError"),
        (pickle.dumps([1], 4), "got 'here': TypeError"),
        (pickle.dumps({"data": X}, 4), "got 'here': KeyError: 'labels'"),
        (python2_batch(X, [1]), r"got data \(2, 3072\) uint8 and labels \(1,\) int64 in 'here'"),
        (python2_batch(X, [1, 10]), r"labels in 0..9, got"),
        (pickle.dumps({"data": X[:, 1:], "labels": [1, 2]}, 4), r"got data \(2, 3071\)"),
        (pickle.dumps({"data": X / 1, "labels": [1, 2]}, 4), r"got data \(2, 3072\) float64"),
        (pickle.dumps({"data": X[:0], "labels": []}, 4), r"got data \(0, 3072\)"),
    ],
)
def test_broken_batch_is_named(content, message):
    with pytest.raises(InputError, match=f"CIFAR-10 batch must be a pickled dict of (?s:.)*{message}"):
        read_batch(content, "here")


def test_incomplete_cifar_is_named(root):
    files, _, _ = small_batches()
    files.pop("data_batch_4")
    path = write_tar(root / "cifar10" / "cifar-10-python.tar.gz", files)
    with pytest.raises(InputError, match=r"must hold cifar-10-batches-py/data_batch_4, got '.*gz' without"):
        load("cifar10")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"must be a readable .tar.gz, got '.*gz'"):
        load("cifar10")
    write_folder(root, files)
    with pytest.raises(InputError, match=r"must be readable, got '.*data_batch_4': No such file"):
        load("cifar10")


def jpeg(grey, mode="RGB", size=(32, 32)):
    """Grey, the upper half by 100 lighter."""
    file, image = io.BytesIO(), Image.new(mode, size, (grey,) * len(mode))
    image.paste((grey + 100,) * len(mode), (0, 0, 32, 16))
    image.save(file, "JPEG")
    return file.getvalue()


def write_jpegs(root, train, test, **changes):
    """Example i of a split is of grey 10 i (of testing: 10 i + 5); changes: {member: content or None}."""
    names = [f"class{c}" for c in range(10)]
    members = {}
    for split, labels, start in (("train", train, 0), ("test", test, 5)):
        for i, c in enumerate(labels):
            members[f"{split}/{names[c]}/{list(labels[:i]).count(c):04d}.jpg"] = jpeg(10 * i + start)
    with zipfile.ZipFile(root / "cifar10" / "cifar10-jpeg.zip", "w") as archive:
        for member, content in sorted((members | changes).items()):
            if content is not None:
                archive.writestr(member, content)
    np.savez(root / "cifar10" / "labels.npz", train=np.uint8(train), test=np.uint8(test), classes=names)


def test_jpegs_come_in_published_order_with_a_note(root):
    train, test = [3, 9, 3, 0, 9, 9, 3], [1, 1, 0]
    write_jpegs(root, train, test)
    data = load("cifar10")
    assert data.train.x.shape == (7, 3, 32, 32)
    for part, y, start in ((data.train, train, 0), (data.test, test, 5)):
        assert part.y.tolist() == y
        grey = (10 * torch.arange(len(y)) + start)[:, None, None, None] / 255
        assert (part.x[:, :, :16] - grey - 100 / 255).abs().max() < 1.5 / 255
        assert (part.x[:, :, 16:] - grey).abs().max() < 1.5 / 255
    assert "lossy JPEG re-encoding" in data.note
    assert "5.8 of 255" in data.note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no item named"),
        (b"no picture", "cannot identify"),
        (jpeg(0)[:-20], "truncated"),
        (jpeg(0, size=(32, 31)), r"RGB of \(32, 31\)"),
        (jpeg(0, "L"), r"L of \(32, 32\)"),
    ],
)
def test_bad_jpeg_is_named(root, content, message):
    write_jpegs(root, [1, 1], [0], **{"train/class1/0001.jpg": content})
    with pytest.raises(InputError, match=rf"got 'train/class1/0001.jpg' in '.*jpeg.zip': .*{message}"):
        load("cifar10")


def test_jpegs_without_their_labels_are_refused(root):
    write_jpegs(root, [1, 1], [0])
    labels = root / "cifar10" / "labels.npz"
    names = [str(c) for c in range(10)]
    for change, message in (
        ({"train": [1, 10]}, r"train in labels.npz must be labels \[N\] in 0..9"),
        ({"classes": names[:9]}, "classes in labels.npz must be 10 names"),
    ):
        np.savez(labels, **({"train": [1, 1], "test": [0], "classes": names} | change))
        with pytest.raises(InputError, match=message):
            load("cifar10")
    np.savez(labels, train=[1])
    with pytest.raises(InputError, match=r"'.*labels.npz' must hold test, classes, got train"):
        load("cifar10")
    labels.unlink()
    with pytest.raises(InputError, match=r"must be a readable .npz without pickles, got '.*labels.npz'"):
        load("cifar10")
    write_jpegs(root, [1, 1], [0])
    (root / "cifar10" / "cifar10-jpeg.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match="must be in a zip archive, got"):
        load("cifar10")


def write_femnist(root, **changes):
    """Three writers with 2, 1 and 1 training images; of three test images, one is its writer's own again,
    and one is another writer's."""
    x = np.arange(4, dtype=np.uint8)[:, None, None] + np.zeros((4, 28, 28), np.uint8)
    arrays = {
        "x_train": x,
        "y_train": np.array([0, 61, 3, 3]),
        "writer_train": np.array([0, 2, 1, 0], np.uint16),
        "x_test": np.stack([x[3], x[3], x[0] + 200]),
        "y_test": np.array([3, 3, 9]),
        "writer_test": np.array([0, 1, 2], np.uint16),
        "writers": np.array(["a", "b", "c"]),
    } | changes
    np.savez(root / "femnist" / "femnist_sample.npz", **{k: v for k, v in arrays.items() if v is not None})


def test_femnist_knows_its_writers_and_the_images_that_are_in_both_parts(root):
    write_femnist(root)
    data = load("femnist")
    assert data.train.x.shape == (4, 1, 28, 28)
    assert data.train.x[:, 0, 5, 5].tolist() == pytest.approx([0, 1 / 255, 2 / 255, 3 / 255])
    assert data.test.y.tolist() == [3, 3, 9]
    assert (data.num_classes, data.clients.tolist()) == (62, [0, 2, 1, 0])
    assert "a sample of 3 writers" in data.note
    assert "1 test images also occur in the training part of the same writer, as in LEAF" in data.note
    parts = partition("natural", data.train.y.numpy(), None, np.random.default_rng(0), data.client_ids)
    assert [p.tolist() for p in parts] == [[0, 3], [2], [1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"writer_test": None}, "must hold writer_test, got x_train"),
        ({"x_train": np.zeros((4, 28, 28))}, r"x_train must be \[N, 28, 28\] uint8, got .* float64"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, r"x_test must be .* got \(0, 28, 28\)"),
        ({"y_test": np.array([1, 2, 62])}, r"y_test must be 3 numbers in 0..61"),
        ({"y_train": np.array([1, 2])}, r"y_train must be 4 numbers in 0..61, got \(2,\)"),
        ({"writer_train": np.array([0, 1, 2, 3])}, "writer_train must be 4 numbers in 0..2"),
        ({"writer_train": np.array([0, 1, 1, 0])}, "each of the 3 writers must have training images"),
        ({"writers": np.array([None, 1, 2])}, "must be a readable .npz without pickles"),
    ],
)
def test_bad_femnist_is_refused(root, changes, message):
    write_femnist(root, **changes)
    with pytest.raises(InputError, match=message):
        load("femnist")


def test_femnist_nowhere_says_what_to_do(root, monkeypatch):
    with pytest.raises(InputError, match=r"set FLTOOLKIT_DATA to a folder that holds femnist/femnist_sample"):
        load("femnist")
    monkeypatch.delenv("FLTOOLKIT_DATA")
    with pytest.raises(InputError, match=r"no download: set FLTOOLKIT_DATA .* got ''"):
        load("femnist")
