"""What the parties of a Bonawitz or SecAgg+ session agree on beforehand.

Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", ePrint 2017/281,
Figure 4; Bell et al. 2020, ePrint 2020/704, whose clients mask and share secrets along the edges of a sparse
graph. A client u sends x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv) modulo 2^b, v over its
neighbours that are still there. The pairs' masks cancel in the sum; where v is gone, its key is rebuilt from
the shares that others hold, where u is there, its seed b_u. Nobody gives out both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fltoolkit.errors import InputError, require
from fltoolkit.secagg.graph import Graph
from fltoolkit.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES
from fltoolkit.secagg.wire import Wire, records

ROUNDS = ("advertise keys", "share keys", "masked input", "unmask")
SIGNED_ROUNDS = ("advertise keys", "share keys", "masked input", "consistency check", "unmask")

SHARE_BYTES = 32
KEYS = records(("cipher", KEY_BYTES), ("mask", KEY_BYTES))
SIGNED_KEYS = records(("cipher", KEY_BYTES), ("mask", KEY_BYTES), ("signature", SIGNATURE_BYTES))
SEALED = records(("sealed", 2 * SHARE_BYTES + TAG_BYTES))
SHARES = records(("share", SHARE_BYTES))
SIGNATURES = records(("signature", SIGNATURE_BYTES))


@dataclass(frozen=True)
class Terms:
    """The public terms of a session.

    graph: whose masks cancel whose; complete for Bonawitz et al. threshold: t, the shares that fix a secret.
    least: the survivors without whom clients reveal nothing. dim, bits: D values modulo 2^b. Where
    `wire.verifiers` is there, clients sign what they send and compare the set of survivors before they reveal
    anything, so that a server may deviate from the protocol; that is proven for the complete graph, and for
    more than two thirds of the clients as threshold.
    """

    wire: Wire
    graph: Graph
    threshold: int
    least: int
    dim: int
    bits: int

    def __post_init__(self) -> None:
        members = self.graph.members
        n = len(members)
        require(self.dim >= 1, "dim", ">= 1", self.dim)
        require(self.bits in range(1, 65), "bits", "an integer from 1 to 64", self.bits)
        most = min(len(self.holders(c)) for c in members) if n else 0
        require(1 <= self.threshold <= most, "threshold", f"from 1 to {most} holders", self.threshold)
        require(1 <= self.least <= n, "least", f"from 1 to {n} clients", self.least)
        if self.signed and self.graph.degree < n - 1:
            raise InputError("a signed session must have the complete graph, got a sparser one")
        if self.signed and 3 * min(self.threshold, self.least) <= 2 * n:
            what = f"above two thirds of its {n} clients"
            raise InputError(f"threshold of a signed session must be {what}, got {self.threshold}")

    @property
    def signed(self) -> bool:
        return self.wire.verifiers is not None

    @property
    def rounds(self) -> tuple[str, ...]:
        return SIGNED_ROUNDS if self.signed else ROUNDS

    def holders(self, client: int) -> tuple[int, ...]:
        """Who holds shares of a client's secrets: its neighbours, and itself where they are all the
        others."""
        near = self.graph.neighbours(client)
        everybody = len(near) == len(self.graph.members) - 1
        return tuple(sorted((*near, client))) if everybody else near

    def point(self, client: int) -> int:
        """Where a holder's shares are values of the polynomials."""
        return self._points[client]

    @cached_property
    def _points(self) -> dict[int, int]:
        return {c: i for i, c in enumerate(self.graph.members, 1)}
