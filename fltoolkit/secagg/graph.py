"""Whose masks cancel whose, and how few neighbours are enough.

Bonawitz et al. 2017, ePrint 2017/281, mask every pair of clients: the complete graph. Bell et al. 2020,
ePrint 2020/704, section 3, need a k-regular graph only, k growing with the logarithm of n: the Harary graph
with its nodes in random order. With γ n clients colluding with the server and δ n dropped, a random graph
is good where

1. no client has t or more colluding neighbours, who could rebuild both of its secrets;
2. the clients that are neither colluding nor dropped are connected, so that only their sum can be unmasked;
3. every client has t or more neighbours that have not dropped, who can rebuild its secret.

`parameters` bounds the chance that 1 or 2 fails, and that 3 fails, for the random Harary graph: neighbours
of a client are k of the n - 1 others at random, so 1 and 3 are hypergeometric tails, times n for all
clients; and a ring in which everybody knows the k/2 before and behind it falls apart only where k/2 in a
row are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, floor, lgamma, log

import numpy as np
from scipy.stats import hypergeom

from fltoolkit.errors import InputError, require


@dataclass(frozen=True)
class Graph:
    """members: the clients in order. adjacent: the neighbours of each, ascending; symmetric, without
    itself."""

    members: tuple[int, ...]
    adjacent: Mapping[int, tuple[int, ...]]

    def neighbours(self, client: int) -> tuple[int, ...]:
        return self.adjacent[client]

    @cached_property
    def positions(self) -> dict[int, int]:
        """Where each client stands among the members."""
        return {c: i for i, c in enumerate(self.members)}

    @property
    def degree(self) -> int:
        """The fewest neighbours that a client has."""
        return min(map(len, self.adjacent.values()))


@dataclass(frozen=True)
class Choice:
    """degree: k. threshold: t, the shares that rebuild a secret. insecure, incorrect: bounds on the chance
    that a graph is not good."""

    degree: int
    threshold: int
    insecure: float
    incorrect: float


def complete(members: Sequence[int]) -> Graph:
    """Everybody is everybody else's neighbour. Raises InputError without members, or with one twice."""
    known = _members(members)
    return Graph(known, {c: tuple(sorted(v for v in known if v != c)) for c in known})


def harary(members: Sequence[int], degree: int, rng: np.random.Generator) -> Graph:
    """The Harary graph H(k, n) over the members in random order: a ring in which everybody is the neighbour
    of the k/2 before and behind it, and for odd k of the one opposite. It stays connected when any k - 1
    leave.

    Raises InputError unless 1 <= degree < n and one of the two is even.
    """
    known = _members(members)
    n = len(known)
    require(1 <= degree < n, "degree", f"from 1 to {n - 1} for {n} clients", degree)
    require(degree * n % 2 == 0, "degree", f"even for an odd number of {n} clients", degree)
    steps = [*range(1, degree // 2 + 1), *([n // 2] if degree % 2 else [])]
    ring = [known[i] for i in rng.permutation(n)]
    adjacent: dict[int, set[int]] = {c: set() for c in known}
    for i, client in enumerate(ring):
        for step in steps:
            other = ring[(i + step) % n]
            adjacent[client].add(other)
            adjacent[other].add(client)
    return Graph(known, {c: tuple(sorted(v)) for c, v in adjacent.items()})


def parameters(
    n: int, corrupt: float, dropout: float, security_bits: float = 40, correctness_bits: float = 20
) -> Choice:
    """The smallest even k, with a t, for which the bounds are at most 2^-security_bits and
    2^-correctness_bits.

    corrupt, dropout: γ and δ, from 0 to below 1, together below 1. Raises InputError where no k < n - 1 is
    enough: then the complete graph is what there is.
    """
    require(n >= 3, "n", ">= 3", n)
    require(0 <= corrupt < 1, "corrupt", "from 0 to below 1", corrupt)
    require(0 <= dropout < 1, "dropout", "from 0 to below 1", dropout)
    require(corrupt + dropout < 1, "corrupt + dropout", "below 1", corrupt + dropout)
    for name, bits in (("security_bits", security_bits), ("correctness_bits", correctness_bits)):
        require(bits > 0, name, "> 0", bits)
    for degree in range(2, n - 1, 2):
        choice = _choice(n, degree, corrupt, dropout, 2.0**-security_bits)
        if choice is not None and choice.incorrect <= 2.0**-correctness_bits:
            return choice
    raise InputError(f"n must be large enough for a sparse graph, got {n}: use the complete graph")


def _choice(n: int, degree: int, corrupt: float, dropout: float, most: float) -> Choice | None:
    """The smallest t that is secure with a chance of at least 1 - most: any larger one is less correct."""
    apart = disconnected(n, degree, corrupt, dropout)
    thresholds = np.arange(1, degree + 1)
    insecure = n * hypergeom.sf(thresholds - 1, n - 1, floor(corrupt * n), degree) + apart
    good = np.flatnonzero(insecure <= most)
    if not len(good):
        return None
    t = int(thresholds[good[0]])
    incorrect = n * float(hypergeom.cdf(t - 1, n - 1, n - 1 - min(n - 1, floor(dropout * n)), degree))
    return Choice(degree, t, float(insecure[good[0]]), incorrect)


def disconnected(n: int, degree: int, corrupt: float, dropout: float) -> float:
    """A bound on the chance that those who are left of a random Harary graph are not connected: n times
    that of k/2 certain clients being all among the (γ + δ) n that are gone."""
    gone, row = floor(corrupt * n) + floor(dropout * n), degree // 2
    if row > gone:
        return 0.0
    return min(1.0, exp(log(n) + _log_choose(n - row, gone - row) - _log_choose(n, gone)))


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _members(members: Sequence[int]) -> tuple[int, ...]:
    known = tuple(int(c) for c in members)
    require(len(known) >= 1, "members", "at least one client", known)
    require(len(set(known)) == len(known), "members", "distinct", known)
    return known
