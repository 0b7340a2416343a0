"""Dealing examples to clients: each example to one client at most, no client without any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fltoolkit.errors import InputError, require, unknown
from fltoolkit.specs import construct, parse

Parts = list[np.ndarray]
"""One array of example indices a client."""


class Partition(Protocol):
    """Deals examples with labels y `[N]`; ids `[N]`: the natural client of each, or None."""

    name: ClassVar[str]
    about: ClassVar[str]

    def __call__(
        self, y: np.ndarray, clients: int | None, rng: np.random.Generator, ids: np.ndarray | None
    ) -> Parts: ...


@dataclass(frozen=True)
class Iid:
    """Shuffle and cut into parts of equal size, up to one example."""

    name: ClassVar[str] = "iid"
    about: ClassVar[str] = "equal random parts"

    def __call__(
        self, y: np.ndarray, clients: int | None, rng: np.random.Generator, ids: np.ndarray | None
    ) -> Parts:
        return np.array_split(rng.permutation(len(y)), _count(clients, ids, len(y)))


@dataclass(frozen=True)
class Shards:
    """The pathological non-IID split of McMahan et al. 2017, arXiv:1602.05629, section 3: sort by label, cut
    into clients · per_client shards, deal each client `per_client` of them, so that most see examples of
    about that many classes."""

    name: ClassVar[str] = "shards"
    about: ClassVar[str] = "sorted by label, per_client shards a client (McMahan et al. 2017)"
    per_client: int = 2

    def __post_init__(self) -> None:
        require(self.per_client >= 1, "per_client", ">= 1", self.per_client)

    def __call__(
        self, y: np.ndarray, clients: int | None, rng: np.random.Generator, ids: np.ndarray | None
    ) -> Parts:
        _one_label_each(self.name, y)
        count = _count(clients, ids, len(y), self.per_client)
        pieces = np.array_split(np.argsort(y, kind="stable"), count * self.per_client)
        dealt = rng.permutation(len(pieces)).reshape(count, self.per_client)
        return [np.concatenate([pieces[i] for i in row]) for row in dealt]


@dataclass(frozen=True)
class Dirichlet:
    """Hsu, Qi, Brown 2019, arXiv:1909.06335, section 3: client k draws class shares q_k ~ Dir(alpha · p), p
    the classes' shares in the data, then an equal number of examples by q_k without replacement. A class
    that is used up is left out and the shares of the others grow in proportion."""

    name: ClassVar[str] = "dirichlet"
    about: ClassVar[str] = "class shares from Dir(alpha · prior), equal sizes (Hsu et al. 2019)"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.alpha < np.inf, "alpha", "a finite number > 0", self.alpha)

    def __call__(
        self, y: np.ndarray, clients: int | None, rng: np.random.Generator, ids: np.ndarray | None
    ) -> Parts:
        _one_label_each(self.name, y)
        count = _count(clients, ids, len(y))
        classes, y = np.unique(y, return_inverse=True)
        stacks = [rng.permutation(np.flatnonzero(y == c)) for c in range(len(classes))]
        left = np.array([len(s) for s in stacks])
        prior = left / left.sum()
        parts = []
        for size in [len(p) for p in np.array_split(np.arange(len(y)), count)]:
            share = rng.dirichlet(self.alpha * prior)
            taken = _draw(share, size, left, rng)
            parts.append(np.concatenate([s[n - t : n] for s, n, t in zip(stacks, left, taken, strict=True)]))
            left = left - taken
        return parts


def _draw(share: np.ndarray, size: int, left: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many of each class to take, `size` in all and never more than are left."""
    taken = np.zeros_like(left)
    while (missing := size - taken.sum()) > 0:
        room = left - taken
        weight = np.where(room > 0, share, 0.0)
        if weight.sum() <= 0:
            weight = room.astype(float)
        taken += np.minimum(rng.multinomial(missing, weight / weight.sum()), room)
    return taken


@dataclass(frozen=True)
class Unbalanced:
    """Random parts whose sizes are lognormal with the given sigma, each at least one example."""

    name: ClassVar[str] = "unbalanced"
    about: ClassVar[str] = "random parts of lognormal sizes with spread sigma"
    sigma: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.sigma <= 100, "sigma", "between 0 and 100", self.sigma)

    def __call__(
        self, y: np.ndarray, clients: int | None, rng: np.random.Generator, ids: np.ndarray | None
    ) -> Parts:
        count = _count(clients, ids, len(y))
        weight = rng.lognormal(0.0, self.sigma, count)
        ends = np.rint(np.cumsum(weight) / weight.sum() * (len(y) - count)).astype(int) + np.arange(
            1, count + 1
        )
        return np.split(rng.permutation(len(y)), ends[:-1])


@dataclass(frozen=True)
class Natural:
    """The clients the data comes from, such as writers or roles: all, or `clients` of them at random."""

    name: ClassVar[str] = "natural"
    about: ClassVar[str] = "the clients the data comes from (writers, roles)"

    def __call__(
        self, y: np.ndarray, clients: int | None, rng: np.random.Generator, ids: np.ndarray | None
    ) -> Parts:
        if ids is None:
            raise InputError("partition 'natural' needs data that knows its clients, got data without")
        order = np.argsort(ids, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)
        if clients is None:
            return parts
        require(1 <= clients <= len(parts), "clients", f"from 1 to the {len(parts)} there are", clients)
        return [parts[k] for k in np.sort(rng.choice(len(parts), clients, replace=False))]


PARTITIONS: Mapping[str, type[Partition]] = {p.name: p for p in (Iid, Shards, Dirichlet, Unbalanced, Natural)}
DEFAULT_CLIENTS = 100


def partition(
    spec: str, y: np.ndarray, clients: int | None, rng: np.random.Generator, ids: np.ndarray | None = None
) -> Parts:
    """Deal by `NAME` or `NAME:key=value`; InputError lists the known names.

    y: labels `[N]`, or token labels `[N, T]` for partitions that do not look at classes. clients: K; None
    stands for the number of natural clients where the data knows them (ids `[N]`), else 100.
    """
    name, options = parse(spec)
    if name not in PARTITIONS:
        unknown("partition", name, PARTITIONS)
    make = construct("partition", PARTITIONS[name], options)
    parts: Parts = make(y, clients, rng, ids)
    return parts


def _count(clients: int | None, ids: np.ndarray | None, examples: int, per_client: int = 1) -> int:
    if clients is None:
        clients = DEFAULT_CLIENTS if ids is None else len(np.unique(ids))
    require(clients >= 1, "clients", ">= 1", clients)
    parts = clients * per_client
    if parts > examples:
        raise InputError(f"clients must leave each part an example, got {parts} parts of {examples} examples")
    return clients


def _one_label_each(name: str, y: np.ndarray) -> None:
    if y.ndim != 1:
        raise InputError(f"partition {name!r} needs one label an example, got labels of shape {y.shape}")
