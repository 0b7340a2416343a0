"""The cells of a grid as jobs: each is made of plain values, runs anywhere, and returns its files.

A `Training` trains one federation to the end and keeps the state before every round that is to be attacked.
An `Attacking` plays such a round again, which gives the same numbers, looks at it as its threat model does,
and attacks. Attacks of one federation share its training.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fltoolkit.errors import InputError
from fltoolkit.tradeoff.attacking import attack_states
from fltoolkit.tradeoff.grid import Stack
from fltoolkit.tradeoff.training import train
from fltoolkit.training.recipe import Recipe

Files = Mapping[str, bytes]
"""What a job returns: contents by file name; the one that ends in .json says that the job is done."""


@dataclass(frozen=True)
class Training:
    """Train `recipe` under `stack` for `rounds` rounds; keep the states before the rounds `attacked`."""

    recipe: Recipe
    stack: Stack
    rounds: int
    attacked: tuple[int, ...]
    delta: float

    @property
    def id(self) -> str:
        return _id("train", asdict(self))

    @property
    def needs(self) -> Training | None:
        return None

    def run(self, given: Files, scratch: Path | None = None) -> Files:
        """scratch: a folder for checkpoints, where a killed job goes on."""
        begun = time.perf_counter()
        try:
            numbers, states = train(self, scratch)
        except InputError as e:
            return {f"{self.id}.json": _json(self, begun, failed=str(e))}
        room = io.BytesIO()
        torch.save(states, room)
        return {f"{self.id}.pt": room.getvalue(), f"{self.id}.json": _json(self, begun, **numbers)}


@dataclass(frozen=True)
class Attacking:
    """Attack what `threat` sees of the attacked rounds of a training, `victims` observations a round.

    threat: None for the adversary that the attack brings along. pictures: how many of a round's first
    images are kept as pictures.
    """

    training: Training
    attack: str
    threat: str | None
    victims: int
    threshold_db: float
    pictures: int = 0

    @property
    def id(self) -> str:
        return _id("attack", asdict(self))

    @property
    def needs(self) -> Training:
        return self.training

    def run(self, given: Files, scratch: Path | None = None) -> Files:
        """given: the files of the training."""
        begun = time.perf_counter()
        if f"{self.training.id}.pt" not in given:
            return {f"{self.id}.json": _json(self, begun, refused="the training failed")}
        states = torch.load(io.BytesIO(given[f"{self.training.id}.pt"]), weights_only=True)
        try:
            found: dict[str, Any] = {"rounds": attack_states(self, states)}
        except InputError as e:
            found = {"refused": str(e)}
        return {f"{self.id}.json": _json(self, begun, **found)}


Job = Training | Attacking


def _id(kind: str, content: Mapping[str, Any]) -> str:
    """A name that changes with anything that the job's numbers depend on."""
    text = json.dumps(content, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _json(job: Job, begun: float, **found: Any) -> bytes:
    content = {"job": asdict(job), **found, "took": time.perf_counter() - begun}
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
