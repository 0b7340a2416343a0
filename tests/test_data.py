"""Data sets: shapes, ranges, splits, the IDX parser, and a user's own images."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fltoolkit.data import load
from fltoolkit.data.idx import FILES, IdxSource, load_idx, read_idx
from fltoolkit.data.photos import FACE, three_photographs
from fltoolkit.errors import InputError

HAVE = os.environ.get("FLTOOLKIT_DATA", "")


def test_digits_are_scikit_learns_split_once():
    from sklearn.datasets import load_digits

    data, raw = load("digits"), load_digits()
    assert data.train.x.shape == (1437, 1, 8, 8)
    assert data.test.x.shape == (360, 1, 8, 8)
    together = torch.cat([data.train.x, data.test.x]).double() * 16
    assert together.sum().item() == raw.images.sum()
    rows = {r.tobytes() for r in together.numpy().astype(np.uint8)}
    assert rows == {r.tobytes() for r in raw.images.astype(np.uint8)[:, None]}
    assert sorted(torch.cat([data.train.y, data.test.y]).tolist()) == sorted(raw.target.tolist())


def test_photos_are_distinct_real_images_and_the_first_is_the_face():
    from skimage import data as sk
    from skimage.transform import resize

    data = load("photos")
    assert data.train.x.shape == (100, 3, 32, 32)
    assert data.train.x.dtype == torch.float32
    assert 0 <= data.train.x.min() < 0.02
    assert 0.98 < data.train.x.max() <= 1
    assert data.train.y.tolist() == list(range(100))
    distance = torch.cdist(data.train.x.flatten(1), data.train.x.flatten(1)) + 1e3 * torch.eye(100)
    assert distance.min() > 0.1
    face = resize(sk.astronaut()[FACE], (32, 32), anti_aliasing=True)
    np.testing.assert_allclose(data.train.x[0].permute(1, 2, 0), face, atol=1e-6)
    assert torch.equal(load("photos").train.x, data.train.x)


def test_three_photographs_follow_their_recipe():
    from skimage import data as sk
    from skimage.transform import resize

    rng, got = np.random.default_rng(0), three_photographs(5)
    for i in range(5):
        image = (sk.astronaut(), sk.chelsea(), sk.coffee())[i % 3]
        h, w = image.shape[:2]
        s = rng.integers(128, min(300, h, w) + 1)
        y, x = rng.integers(0, h - s + 1), rng.integers(0, w - s + 1)
        expected = resize(image[y : y + s, x : x + s], (32, 32), anti_aliasing=True)
        np.testing.assert_allclose(got[i].permute(1, 2, 0), expected, atol=1e-6)


@pytest.mark.skipif(
    not (Path(HAVE) / "mnist").is_dir(), reason="FLTOOLKIT_DATA does not point at a folder with mnist/"
)
@pytest.mark.parametrize(
    ("name", "first", "pixels"),
    [("mnist", [5, 0, 4, 1, 9], 1_567_298_545), ("fashion-mnist", [9, 0, 0, 3, 0], 3_431_114_169)],
)
def test_idx_data_sets_are_the_published_ones(name, first, pixels):
    data = load(name)
    assert data.train.x.shape == (60_000, 1, 28, 28)
    assert data.test.x.shape == (10_000, 1, 28, 28)
    assert data.train.y[:5].tolist() == first
    assert (data.train.x.double() * 255).round().sum().item() == pixels
    assert data.num_classes == 10


def write_idx(path, dims, payload, head=b"\0\0\x08"):
    content = head + bytes([len(dims)]) + struct.pack(f">{len(dims)}I", *dims) + payload
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_idx_parser_reads_what_was_written(tmp_path, name):
    path = write_idx(tmp_path / name, (2, 3), bytes(range(6)))
    assert read_idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("dims", "payload", "head", "message"),
    [
        ((2, 3), bytes(5), b"\0\0\x08", r"must hold \(2, 3\) values as its header says, got 5"),
        ((2, 3), bytes(7), b"\0\0\x08", "got 7"),
        ((6,), bytes(6), b"\0\0\x0d", "must begin with 0, 0, 8"),
    ],
)
def test_idx_parser_names_a_broken_file(tmp_path, dims, payload, head, message):
    with pytest.raises(InputError, match=message):
        read_idx(write_idx(tmp_path / "broken", dims, payload, head))


def test_idx_file_that_is_cut_short_or_missing_is_named(tmp_path):
    whole = write_idx(tmp_path / "a.gz", (50, 50), np.random.default_rng(0).bytes(2500))
    whole.write_bytes(whole.read_bytes()[:-300])
    for path in (whole, tmp_path / "none"):
        with pytest.raises(InputError, match="IDX file must be readable"):
            read_idx(path)


def test_mnist_nowhere_says_what_to_do(tmp_path, monkeypatch):
    import pooch

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.delenv("FLTOOLKIT_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(InputError, match=r"Set FLTOOLKIT_DATA to a folder that holds mnist/train-images"):
        load("mnist")


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """(folder, URL): a local HTTP server over the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()


def small_idx_source(folder, url):
    """A data set of three training images and two test images that the server offers."""
    for name, dims in zip(FILES, [(3, 2, 2), (3,), (2, 2, 2), (2,)], strict=True):
        write_idx(folder / f"{name}.gz", dims, bytes(range(prod(dims))))
    md5 = {f: hashlib.md5((folder / f"{f}.gz").read_bytes()).hexdigest() for f in FILES}
    return IdxSource("small", url, md5)


def test_download_is_cached_and_a_file_with_other_content_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.delenv("FLTOOLKIT_DATA", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    folder, url = server
    source = small_idx_source(folder, url)
    assert load_idx(source).train.y.tolist() == [0, 1, 2]
    write_idx(folder / f"{FILES[1]}.gz", (3,), bytes([9, 9, 9]))
    assert load_idx(source).train.y.tolist() == [0, 1, 2]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match=rf"{FILES[1]}.gz gave: (?s:.)*hash"):
        load_idx(source)


def paint(path, colour, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_folder_of_subfolders_is_classes(tmp_path):
    paint(tmp_path / "b" / "1.png", (255, 0, 0))
    paint(tmp_path / "a" / "1.png", (0, 0, 255))
    paint(tmp_path / "a" / "2.jpg", (0, 255, 0), (32, 90))
    data = load(f"folder:{tmp_path}")
    assert data.train.x.shape == (3, 3, 32, 32)
    assert data.train.y.tolist() == [0, 0, 1]
    assert data.num_classes == 2
    assert data.train.x[0, :, 5, 5].tolist() == [0.0, 0.0, 1.0]


def test_flat_folder_makes_each_image_its_own_class(tmp_path):
    for i in range(3):
        paint(tmp_path / f"{i}.png", (80 * i, 0, 0))
    data = load(f"folder:{tmp_path}")
    assert data.train.y.tolist() == [0, 1, 2]
    assert data.train.x[:, 0, 0, 0].tolist() == pytest.approx([0, 80 / 255, 160 / 255])


def test_folder_keeps_the_middle_square(tmp_path):
    picture = Image.new("RGB", (96, 32), (0, 0, 0))
    picture.paste((255, 255, 255), (32, 0, 64, 32))
    picture.save(tmp_path / "p.png")
    assert load(f"folder:{tmp_path}").train.x.min() == 1.0


def test_hidden_files_are_no_images(tmp_path):
    paint(tmp_path / "1.png", (0, 0, 0))
    (tmp_path / "._1.png").write_bytes(b"a resource fork")
    (tmp_path / ".thumbnails").mkdir()
    paint(tmp_path / ".thumbnails" / "1.png", (9, 9, 9))
    data = load(f"folder:{tmp_path}")
    assert (len(data.train), float(data.train.x.max())) == (1, 0.0)


def test_sixteen_bit_grey_keeps_its_tones(tmp_path):
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(tmp_path / "grey.png")
    x = load(f"folder:{tmp_path}").train.x
    assert x.shape == (1, 3, 32, 32)
    assert (x - 40_000 / 65_535).abs().max() < 1 / 255


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="data folder must be readable, got '/no/such/place'"):
        load("folder:/no/such/place")
    with pytest.raises(InputError, match="data folder must hold images"):
        load(f"folder:{tmp_path}")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"image must be readable, got '.*broken.png'"):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnits", r"unknown data set 'mnits'; did you mean 'mnist'\? \(known: cifar10, digits, "),
        ("folder", "data must be 'folder:PATH', got 'folder'"),
        ("digits:8", "data must be 'digits', got 'digits:8'"),
    ],
)
def test_unknown_data_sets_list_the_known(spec, message):
    with pytest.raises(InputError, match=message):
        load(spec)
