"""Who masks with whom and holds whose shares: the communication graph, its degree and the threshold.

Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", ePrint 2017/281:
the complete graph. Bell, Bonawitz, Gascón, Lepoint and Raykova 2020, "Secure single-server aggregation with
(poly)logarithmic overhead", ePrint 2020/704: a k-regular graph, in which a client's two secrets are shared
t-of-k among its k neighbours, not with itself. The graph is a Harary graph (Harary 1962, "The maximum
connectivity of a graph", PNAS 48) under random labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, lgamma, log

import numpy as np
from scipy.stats import hypergeom

from fltoolkit.errors import InputError, require


@dataclass(frozen=True)
class Graph:
    """A simple graph. members: the clients in the order given. adjacent: each member's neighbours, sorted;
    symmetric, nobody its own neighbour."""

    members: tuple[int, ...]
    adjacent: Mapping[int, tuple[int, ...]]

    def neighbours(self, client: int) -> tuple[int, ...]:
        """Sorted. Raises InputError where the client is no member."""
        require(client in self.adjacent, "client", "a member of the graph", client)
        return self.adjacent[client]

    @property
    def degree(self) -> int:
        """The smallest number of neighbours."""
        return min(map(len, self.adjacent.values()), default=0)


@dataclass(frozen=True)
class Choice:
    """degree, threshold: k and t. insecure, incorrect: bounds on the probabilities that a session does not
    protect an honest client, and that an honest session cannot finish."""

    degree: int
    threshold: int
    insecure: float
    incorrect: float


def complete(members: Sequence[int]) -> Graph:
    """Everybody beside everybody else. Raises InputError where a member is there twice."""
    everybody = _distinct(members)
    ids = range(len(everybody))
    return _graph(everybody, ([j for j in ids if j != i] for i in ids))


def harary(members: Sequence[int], degree: int, rng: np.random.Generator) -> Graph:
    """The Harary graph H(k, n) over a random circle of the members.

    Neighbours are at most k // 2 places apart, and opposite each other too where k is odd. No fewer than k
    members must go before the rest falls apart. Raises InputError where members repeat, the degree is not
    from 2 to n - 1, or degree and n are both odd.
    """
    everybody = _suited(members, degree)
    n = len(everybody)
    steps = np.arange(1, degree // 2 + 1)
    apart = np.concatenate([steps, -steps, np.full(degree % 2, n // 2)])
    circle = rng.permutation(n)
    near = np.empty((n, degree), np.int64)
    near[circle] = circle[(np.arange(n)[:, None] + apart) % n]
    return _graph(everybody, near.tolist())


def parameters(
    n: int, corrupt: float, dropout: float, security_bits: float = 40, correctness_bits: float = 20
) -> Choice:
    """The smallest even degree k < n - 1 of a Harary graph, and then the smallest threshold t >= 2, such that
    insecure <= 2^-security_bits and incorrect <= 2^-correctness_bits.

    Of n clients at most c = ⌊corrupt · n⌋ collude with the server, which keeps to the protocol, and at most
    d = ⌊dropout · n⌋ drop out; who does is independent of the random labels. Union bounds, with
    X ~ Hypergeometric(n - 1 others, c of them colluding, k drawn) and Z the same with d dropped:

    insecure  = n P[X >= t], that some honest client has t colluding neighbours, who give its second secret
                away when the server has been given the first,
              + n (n - k - 1) / 2 · C(c + d, k) / C(n, k), that the honest survivors are not connected, so
                that the sum of a part is seen: they are not if and only if k / 2 in a row are gone in two
                places of the circle, and there are n (n - k - 1) / 2 such pairs of places; incorrect = n
                P[k - Z < t], that some client has fewer than t surviving neighbours.

    These are the events of ePrint 2020/704, and the bounds those of its authors' `graph_parameter_finder`
    (Federated Compute Platform), which splits 2^-40 evenly between the first two and draws the neighbours
    from all n clients instead of the n - 1 others; its tests have k = 38, t = 22 for n = 10^6 with 5 % each
    and k = 518, t = 270 with 33 % each.

    corrupt, dropout: from 0, below 1 in sum. bits: > 0. Raises InputError otherwise, and where no k < n - 1
    suffices. A threshold of 1 would hand secrets to every neighbour and is never chosen.
    """
    require(n >= 1, "n", ">= 1", n)
    require(0 <= corrupt < 1, "corrupt", "from 0 to below 1", corrupt)
    require(0 <= dropout < 1, "dropout", "from 0 to below 1", dropout)
    require(corrupt + dropout < 1, "corrupt + dropout", "below 1", corrupt + dropout)
    require(0 < security_bits < inf, "security_bits", "a finite number > 0", security_bits)
    require(0 < correctness_bits < inf, "correctness_bits", "a finite number > 0", correctness_bits)
    colluding, dropped = _most(corrupt, n), _most(dropout, n)
    secure, correct = -security_bits * log(2), -correctness_bits * log(2)
    degree = 2
    while degree < n - 1:
        parted = _log_parted(n, degree, colluding + dropped)
        if parted > secure:
            degree += 2
            continue
        exposed = log(n) + _log_at_least(n - 1, colluding, degree)[2:]
        stuck = log(n) + _log_at_least(n - 1, dropped, degree)[-2:0:-1]
        insecure = np.logaddexp(exposed, parted)
        least, end = int((insecure > secure).sum()), int((stuck <= correct).sum())
        if least < end:
            return Choice(degree, least + 2, exp(insecure[least]), exp(stuck[least]))
        # With one neighbour more the largest t that is correct grows by at most 1, and the smallest that does
        # not expose anybody does not fall, so that no smaller step can close the gap between them.
        gap = int((exposed > secure).sum()) - end + 1
        degree += max(2, gap + gap % 2)
    raise InputError(
        f"no degree below {n - 1} suffices for {n} clients with corrupt={corrupt}, dropout={dropout}, "
        f"security_bits={security_bits} and correctness_bits={correctness_bits}; use the complete graph"
    )


def _most(fraction: float, n: int) -> int:
    """⌊fraction · n⌋, where a product that rounding left just below an integer counts as that integer."""
    return int(fraction * n * (1 + 1e-12))


def _log_parted(n: int, degree: int, gone: int) -> float:
    """log of n (n - k - 1) / 2 · C(gone, k) / C(n, k)."""
    if gone < degree:
        return -inf
    places = log(n) + log(n - degree - 1) - log(2)
    return places + lgamma(gone + 1) - lgamma(gone - degree + 1) - lgamma(n + 1) + lgamma(n - degree + 1)


def _log_at_least(total: int, marked: int, draws: int) -> np.ndarray:
    """log P[X >= j] `[draws + 1]` for X the marked among `draws` of `total` without replacement."""
    low, high = max(0, draws - (total - marked)), min(draws, marked)
    logs = np.full(draws + 1, -inf)
    logs[low : high + 1] = hypergeom.logpmf(np.arange(low, high + 1), total, marked, draws)
    tails: np.ndarray = np.logaddexp.accumulate(logs[::-1])[::-1]
    return tails


def _distinct(members: Sequence[int]) -> tuple[int, ...]:
    everybody = tuple(int(m) for m in members)
    if len(set(everybody)) < len(everybody):
        values, counts = np.unique(everybody, return_counts=True)
        raise InputError(f"members must be distinct, got {values[counts > 1][0]} more than once")
    return everybody


def _suited(members: Sequence[int], degree: int) -> tuple[int, ...]:
    everybody = _distinct(members)
    n = len(everybody)
    require(n >= 3, "members", "at least 3 clients for a regular graph", n)
    require(degree in range(2, n), "degree", f"an integer from 2 to {n - 1} for {n} clients", degree)
    require(degree * n % 2 == 0, "degree", f"even for an odd number of clients ({n})", degree)
    return everybody


def _graph(members: tuple[int, ...], near: Iterable[Iterable[int]]) -> Graph:
    """From each member's neighbours, as places in `members`."""
    rows = (tuple(sorted(members[j] for j in row)) for row in near)
    return Graph(members, dict(zip(members, rows, strict=True)))
