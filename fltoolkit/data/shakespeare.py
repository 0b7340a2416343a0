"""Shakespeare by play and role, after McMahan et al. 2017, arXiv:1602.05629, section 3.

A client is a speaking role of a play with at least two lines; the first 80 % of its lines are for training,
the last 20 % for testing. The plays are the Moby edition in Jon Bosak's markup, one XML file a play.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from fltoolkit.data.dataset import Dataset
from fltoolkit.data.files import local
from fltoolkit.errors import InputError
from fltoolkit.loss import IGNORE
from fltoolkit.models.text import CHARACTERS, PADDING, START
from fltoolkit.types import Examples

PLAYS = "moby-plays.zip"
CHARACTER_STEPS, WORD_STEPS = 80, 10
WORDS = 10_000
START_WORD, UNKNOWN_WORD, NO_WORD = WORDS - 3, WORDS - 2, WORDS - 1
NOTE = (
    "Shakespeare: the Moby edition, {roles} roles with at least two lines; "
    "the paper's 1,146 come from another edition."
)
WORD_NOTE = (
    "Next word: the same roles stand in for the paper's private corpus of social-network posts; "
    f"what is outside the {WORDS - 3} most frequent words counts as one word, 'unknown'."
)
Pairs = tuple[np.ndarray, np.ndarray]
"""Inputs and labels, both `[N, steps]`."""


class Role(NamedTuple):
    """A client: what one speaker of a play says, line by line."""

    play: str
    speaker: str
    lines: tuple[str, ...]

    @property
    def train(self) -> tuple[str, ...]:
        return self.lines[: 4 * len(self.lines) // 5]

    @property
    def test(self) -> tuple[str, ...]:
        return self.lines[4 * len(self.lines) // 5 :]


def load_characters(_: str) -> Dataset:
    """An example is a line: y `[80]` int64 its characters, as bytes of Latin-1, and x `[80]` what precedes
    each, the start symbol first; filled up with IGNORE and the padding symbol."""
    roles = read_roles()

    def examples(lines: Sequence[str]) -> Pairs:
        return _windows([_bytes(line) for line in lines], CHARACTER_STEPS, START, PADDING)

    return _dataset("shakespeare", roles, examples, CHARACTERS, NOTE.format(roles=len(roles)))


def load_words(_: str) -> Dataset:
    """An example is ten successive words of a role: y `[10]` int64, and x `[10]` the word before each."""
    roles = read_roles()
    counts = Counter(w for role in roles for w in words(role.train))
    numbers = {w: i for i, (w, _) in enumerate(counts.most_common(WORDS - 3))}

    def examples(lines: Sequence[str]) -> Pairs:
        text = np.array([numbers.get(w, UNKNOWN_WORD) for w in words(lines)], np.int64)
        return _windows([text], WORD_STEPS, START_WORD, NO_WORD)

    note = f"{NOTE.format(roles=len(roles))} {WORD_NOTE}"
    return _dataset("shakespeare-words", roles, examples, WORDS, note)


def words(lines: Sequence[str]) -> list[str]:
    """Words in lower case and punctuation marks, one after the other."""
    return [w for line in lines for w in re.findall(r"[a-z']+|[^\sa-z']", line.lower())]


@cache
def read_roles() -> tuple[Role, ...]:
    """All roles with at least two lines, by play and in order of appearance. A speech of several belongs to
    the first named."""
    path = local("shakespeare", PLAYS)
    if path is None:
        raise InputError(
            "data 'shakespeare' must be at hand: "
            f"set FLTOOLKIT_DATA to a folder that holds shakespeare/{PLAYS}"
        )
    try:
        with zipfile.ZipFile(path) as plays:
            texts = {name: plays.read(name) for name in sorted(plays.namelist())}
        found = [Role(name, *role) for name, text in texts.items() for role in _speakers(text)]
    except (OSError, zipfile.BadZipFile, zlib.error, ElementTree.ParseError) as e:
        raise InputError(f"plays must be XML files in a zip archive, got {str(path)!r}: {e}") from e
    return tuple(r for r in found if len(r.lines) >= 2)


def _speakers(play: bytes) -> list[tuple[str, tuple[str, ...]]]:
    lines: dict[str, list[str]] = {}
    for speech in ElementTree.fromstring(play).iter("SPEECH"):
        spoken = (" ".join("".join(line.itertext()).split()) for line in speech.iter("LINE"))
        lines.setdefault(speech.findtext("SPEAKER") or "", []).extend(s for s in spoken if s)
    return [(speaker, tuple(spoken)) for speaker, spoken in lines.items()]


def _bytes(line: str) -> np.ndarray:
    return np.frombuffer(line.encode("latin-1", "replace"), np.uint8).astype(np.int64)


def _windows(texts: Sequence[np.ndarray], steps: int, start: int, padding: int) -> Pairs:
    """Texts cut into pieces of `steps` tokens: what precedes each token, and the tokens."""
    pieces = [(text, at) for text in texts for at in range(0, len(text), steps)]
    x = np.full((len(pieces), steps), padding, np.int64)
    y = np.full((len(pieces), steps), IGNORE, np.int64)
    for row, (text, at) in enumerate(pieces):
        piece = text[at : at + steps]
        y[row, : len(piece)] = piece
        x[row, : len(piece)] = np.r_[text[at - 1] if at else start, piece[:-1]]
    return x, y


def _dataset(
    name: str, roles: Sequence[Role], examples: Callable[[Sequence[str]], Pairs], tokens: int, note: str
) -> Dataset:
    train, test = [examples(r.train) for r in roles], [examples(r.test) for r in roles]
    owner = np.repeat(np.arange(len(roles)), [len(x) for x, _ in train])
    return Dataset(
        name,
        _joined(train),
        _joined(test),
        tokens,
        input_range=(0.0, tokens - 1.0),
        clients=torch.from_numpy(owner),
        note=note,
    )


def _joined(pairs: Sequence[Pairs]) -> Examples:
    x, y = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return Examples(torch.from_numpy(x), torch.from_numpy(y))
