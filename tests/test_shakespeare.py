"""Shakespeare by play and role: the split, the windows, and what the models read."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch

from fltoolkit.data import load, shakespeare
from fltoolkit.errors import InputError
from fltoolkit.loss import IGNORE
from fltoolkit.models.text import CHARACTERS, PADDING, START

HAVE = os.environ.get("FLTOOLKIT_DATA", "")

PLAY = """<?xml version="1.0"?><PLAY><ACT>
<SPEECH><SPEAKER>FIRST</SPEAKER>{first}</SPEECH>
<SPEECH><SPEAKER>SECOND</SPEAKER><SPEAKER>FIRST</SPEAKER><LINE>To be,  or
 not <STAGEDIR>aside</STAGEDIR></LINE><LINE></LINE><LINE>yes</LINE></SPEECH>
<SPEECH><SPEAKER>MUTE</SPEAKER><LINE>once</LINE></SPEECH>
<SPEECH><SPEAKER>FIRST</SPEAKER><LINE>{long}</LINE></SPEECH></ACT></PLAY>"""


@pytest.fixture
def plays(tmp_path, monkeypatch):
    """Two plays of the same text: FIRST has seven lines, SECOND two, MUTE one."""
    lines = "".join(f"<LINE>line {k}</LINE>" for k in range(6))
    text = PLAY.format(first=lines, long="x" * 90 + "end")
    (tmp_path / "shakespeare").mkdir()
    with zipfile.ZipFile(tmp_path / "shakespeare" / shakespeare.PLAYS, "w") as z:
        z.writestr("b.xml", text)
        z.writestr("a.xml", text)
    monkeypatch.setenv("FLTOOLKIT_DATA", str(tmp_path))
    shakespeare.read_roles.cache_clear()
    yield tmp_path
    shakespeare.read_roles.cache_clear()


def read(x, y):
    """A line back from its example."""
    return bytes(y[y != IGNORE].tolist()).decode("latin-1"), x[: int((y != IGNORE).sum())].tolist()


def test_roles_are_split_by_lines_in_order(plays):
    roles = shakespeare.read_roles()
    assert [(r.play, r.speaker, len(r.train), len(r.test)) for r in roles] == [
        ("a.xml", "FIRST", 5, 2),
        ("a.xml", "SECOND", 1, 1),
        ("b.xml", "FIRST", 5, 2),
        ("b.xml", "SECOND", 1, 1),
    ]
    assert roles[0].train == tuple(f"line {k}" for k in range(5))
    assert roles[1].train == ("To be, or not aside",)


def test_a_damaged_archive_is_named(plays):
    path = plays / "shakespeare" / shakespeare.PLAYS
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.xml", bytes(range(256)) * 9)
    content = bytearray(path.read_bytes())
    content[35] = 255  # a kind of block that there is not
    path.write_bytes(content)
    with pytest.raises(InputError, match="plays must be XML files in a zip archive"):
        shakespeare.read_roles()


def test_examples_are_lines_with_what_precedes_each_character(plays):
    data = load("shakespeare")
    assert data.train.x.shape == (12, 80)
    assert data.clients.tolist() == [0] * 5 + [1] + [2] * 5 + [3]
    assert data.num_classes == CHARACTERS == 258
    line, before = read(data.train.x[0], data.train.y[0])
    assert line == "line 0"
    assert before == [START, *b"line "]
    assert (data.train.x[0, 6:] == PADDING).all()
    lines = [read(x, y) for x, y in zip(data.test.x, data.test.y, strict=True)]
    assert [t for t, _ in lines[:4]] == ["line 5", "x" * 80, "x" * 10 + "end", "yes"]
    assert lines[2][1][0] == ord("x")
    assert data.tokens


def test_words_are_windows_of_a_role_and_rare_ones_are_unknown(plays):
    data = load("shakespeare-words")
    assert data.num_classes == 10_000
    assert data.train.x.shape == (4, 10)
    first = data.train.y[0]
    assert (first != IGNORE).sum() == 10
    assert (first[0::2] == first[0]).all()
    assert data.train.x[0].tolist() == [shakespeare.START_WORD, *first[:-1].tolist()]
    assert data.test.y[0, :4].tolist() == [first[0], *[shakespeare.UNKNOWN_WORD] * 2, IGNORE]
    assert shakespeare.words(["O, 'tis TRUE!"]) == ["o", ",", "'tis", "true", "!"]


def test_bad_archives_are_refused(plays, monkeypatch):
    (plays / "shakespeare" / shakespeare.PLAYS).write_bytes(b"no zip")
    with pytest.raises(InputError, match="plays must be XML files in a zip archive"):
        load("shakespeare")
    monkeypatch.setenv("FLTOOLKIT_DATA", str(plays / "nowhere"))
    with pytest.raises(InputError, match="set FLTOOLKIT_DATA to a folder that holds shakespeare"):
        load("shakespeare")


@pytest.mark.skipif(not HAVE, reason="needs FLTOOLKIT_DATA")
def test_the_moby_edition():
    """The paper's own edition gave 1,146 roles and 74 lines a role (u = 7.4 at B = 10)."""
    shakespeare.read_roles.cache_clear()
    data = load("shakespeare")
    counts = np.bincount(data.clients.numpy())
    assert len(counts) == 1247
    assert counts.min() == 1
    assert counts.max() > 1000
    assert 3.3e6 < (data.train.y != IGNORE).sum() < 3.4e6
    assert 0.79 < len(data.train) / (len(data.train) + len(data.test)) < 0.8
    assert int(data.train.x.max()) == PADDING
    assert "1247 roles" in data.note
    words = load("shakespeare-words")
    share = (words.test.y == shakespeare.UNKNOWN_WORD).sum() / (words.test.y != IGNORE).sum()
    assert 0.01 < share < 0.05
    assert torch.equal(words.clients.unique(), torch.arange(1247))
