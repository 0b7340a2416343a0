"""Dealing examples to clients. McMahan et al. 2017, arXiv:1602.05629, section 3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fltoolkit.errors import InputError, require, unknown

Parts = list[np.ndarray]
"""One array of example indices a client; every example belongs to exactly one."""


def iid(y: np.ndarray, clients: int, rng: np.random.Generator) -> Parts:
    """Shuffle and cut into parts of equal size, up to one example."""
    _check(len(y), clients)
    return np.array_split(rng.permutation(len(y)), clients)


def shards(y: np.ndarray, clients: int, rng: np.random.Generator, per_client: int = 2) -> Parts:
    """The paper's pathological non-IID split: sort by label, cut into clients · per_client shards, deal
    each client `per_client` of them, so that most see examples of about that many classes."""
    require(per_client >= 1, "per_client", ">= 1", per_client)
    _check(len(y), clients * per_client)
    pieces = np.array_split(np.argsort(y, kind="stable"), clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.concatenate([pieces[i] for i in row]) for row in dealt]


PARTITIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], Parts]] = {
    "iid": iid,
    "shards": partial(shards, per_client=2),
}


def partition(name: str, y: np.ndarray, clients: int, rng: np.random.Generator) -> Parts:
    """Deal by the partition called `name`; InputError lists the known ones."""
    if name not in PARTITIONS:
        unknown("partition", name, PARTITIONS)
    return PARTITIONS[name](y, clients, rng)


def _check(examples: int, parts: int) -> None:
    require(parts >= 1, "clients", ">= 1", parts)
    if parts > examples:
        raise InputError(f"clients must leave each part an example, got {parts} parts of {examples} examples")
