"""A sum by several servers that do not collude: multi-party computation on secret shares.

Each client sends each server one share of its input (`fltoolkit.secagg.sharing`) over a private channel, as
under TLS. The servers tell each other whom they heard from, add up the shares of those whom all of them
heard, each times a public weight where there are weights, and publish these sums; all of them, or any t
with Shamir's shares, give the total and nothing else. A client needs no second message, and the servers'
work is additions. Servers are honest but curious: one that tells two others different things of whom it
heard from can have two totals made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_bytes

import numpy as np

from fltoolkit.errors import require
from fltoolkit.secagg.errors import Inconsistent, Malformed, OutOfOrder, Replayed, TooFew
from fltoolkit.secagg.lightsecagg import fresh_words
from fltoolkit.secagg.parties import bitmap, members_in
from fltoolkit.secagg.prime_field import PRIME, uniform
from fltoolkit.secagg.sharing import add_up, additive, interpolate, polynomial
from fltoolkit.secagg.wire import Wire
from fltoolkit.secagg.words import SEED_BYTES, add_mask, pack, reduce, unpack, word

SHARES, HEARD, TOTALS = range(3)
"""The rounds: clients to servers, servers to each other, servers to everybody."""


@dataclass(frozen=True)
class Terms:
    """The public terms of a session.

    members: the clients in order. servers: S. threshold: t, how many of them read a total; S for additive
    shares modulo 2^bits, fewer for Shamir's modulo 2^32 - 5 (bits 32). least: the fewest clients in a total.
    dim: D values.
    """

    wire: Wire
    members: tuple[int, ...]
    servers: int
    threshold: int
    least: int
    dim: int
    bits: int = 32

    def __post_init__(self) -> None:
        require(self.servers >= 2, "servers", ">= 2", self.servers)
        require(2 <= self.threshold <= self.servers, "threshold", f"from 2 to {self.servers}", self.threshold)
        n = len(self.members)
        require(len(set(self.members)) == n, "members", "distinct", self.members)
        require(1 <= self.least <= n, "least", f"from 1 to {n} clients", self.least)
        require(self.dim >= 1, "dim", ">= 1", self.dim)
        require(self.bits in range(1, 65), "bits", "an integer from 1 to 64", self.bits)
        require(self.is_additive or self.bits == 32, "bits", "32 with a threshold", self.bits)

    @property
    def is_additive(self) -> bool:
        return self.threshold == self.servers

    def share(self, body: bytes | memoryview) -> np.ndarray:
        """A share `[D]` from its bytes; raises Malformed."""
        found = unpack(body, self.dim, self.bits)
        if not self.is_additive and (found >= PRIME).any():
            raise Malformed(f"words must be below {PRIME}")
        return found


def client_messages(identity: int, words: np.ndarray, terms: Terms) -> list[bytes]:
    """What a client with the input `words [D]` sends, a message for each server. Additive shares but the
    last are sent as the seeds of their keystreams."""
    if terms.is_additive:
        seeds = [token_bytes(SEED_BYTES) for _ in range(terms.servers - 1)]
        last = additive(words, np.stack([_expanded(s, terms) for s in seeds]), terms.bits)
        bodies: list[bytes | memoryview] = [*seeds, pack(last, terms.bits)]
    else:
        noise = uniform(fresh_words, (terms.threshold - 1) * terms.dim).reshape(-1, terms.dim)
        shares = polynomial(words, noise, range(1, terms.servers + 1)).astype("<u4")
        bodies = [pack(s, 32) for s in shares]
    return [terms.wire.pack(SHARES, identity, body) for body in bodies]


class Server:
    """Server number `index`, from 0. weights: a public whole number for each client (None: 1)."""

    def __init__(self, index: int, terms: Terms, weights: Mapping[int, int] | None = None) -> None:
        self.index, self.terms, self._weights = index, terms, weights or {}
        self._shares: dict[int, bytes] = {}
        self._agreed: frozenset[int] | None = None

    def receive(self, client: int, message: bytes) -> None:
        """Take in a client's share. Raises ProtocolError, and keeps nothing of it, where it is refused."""
        if client not in self.terms.members:
            raise OutOfOrder(f"client {client} must be a member")
        if client in self._shares:
            raise Replayed(f"client {client} must send one share to a server")
        if self._agreed is not None:
            raise OutOfOrder("shares must arrive before the servers agree on who is in the total")
        body = self.terms.wire.unpack(message, SHARES, client)
        if not self._takes_seeds:
            self.terms.share(body)
        elif len(body) != SEED_BYTES:
            raise Malformed(f"a seed must be {SEED_BYTES} bytes, got {len(body)}")
        self._shares[client] = bytes(body)

    def heard(self) -> bytes:
        """Whom this server heard from, for the others."""
        return self.terms.wire.pack(HEARD, self.index, bitmap(self.terms.members, self._shares))

    def agree(self, others: Mapping[int, bytes]) -> frozenset[int]:
        """Who is in the total: those whom this server and all the `others` heard. Raises TooFew, and
        Inconsistent where a server is missing or another set had been agreed on."""
        if {self.index, *others} != set(range(self.terms.servers)) or self.index in others:
            raise Inconsistent(f"servers that agree must be all {self.terms.servers}, got {sorted(others)}")
        agreed = frozenset(self._shares)
        for index, message in others.items():
            agreed &= members_in(self.terms.members, self.terms.wire.unpack(message, HEARD, index))
        if len(agreed) < self.terms.least:
            raise TooFew(f"clients in a total must be at least {self.terms.least}, got {len(agreed)}")
        if self._agreed not in (None, agreed):
            raise Inconsistent("a server must add up one set of clients")
        self._agreed = agreed
        return agreed

    def total(self) -> bytes:
        """The agreed clients and the weighted sum of their shares, for everybody."""
        if self._agreed is None:
            raise OutOfOrder("servers must agree on who is in the total first")
        sums = np.zeros(self.terms.dim, word(self.terms.bits) if self.terms.is_additive else np.uint64)
        for client in self._agreed:
            share, weight = self.share_of(client), self._weights.get(client, 1)
            if self.terms.is_additive:
                sums += share * share.dtype.type(weight % 2**self.terms.bits)
            else:
                sums = (sums + share.astype(np.uint64) * np.uint64(weight % PRIME)) % np.uint64(PRIME)
        done = reduce(sums.astype(word(self.terms.bits)), self.terms.bits)
        body = bitmap(self.terms.members, self._agreed) + bytes(pack(done, self.terms.bits))
        return self.terms.wire.pack(TOTALS, self.index, body)

    @property
    def _takes_seeds(self) -> bool:
        return self.terms.is_additive and self.index < self.terms.servers - 1

    def share_of(self, client: int) -> np.ndarray:
        """The share `[D]` of a client that was heard."""
        held = self._shares[client]
        return _expanded(held, self.terms) if self._takes_seeds else self.terms.share(held)


def reconstruct(totals: Mapping[int, bytes], terms: Terms) -> np.ndarray:
    """The total `[D]` from the servers' sums, by server. Raises TooFew where there are fewer than t, and
    Inconsistent where they are sums over different clients."""
    if not set(totals) <= set(range(terms.servers)):
        raise OutOfOrder(f"sums must be those of servers 0 to {terms.servers - 1}, got {sorted(totals)}")
    if len(totals) < terms.threshold:
        raise TooFew(f"servers with a sum must be at least {terms.threshold}, got {len(totals)}")
    bodies = {i: terms.wire.unpack(message, TOTALS, i) for i, message in totals.items()}
    at = len(bitmap(terms.members, ()))
    sets = [members_in(terms.members, body[:at]) for body in bodies.values()]
    if len(set(sets)) > 1:
        raise Inconsistent("sums must be over the same clients")
    chosen = sorted(totals)[: terms.threshold]
    sums = [terms.share(bodies[i][at:]) for i in chosen]
    if terms.is_additive:
        return add_up(sums, terms.bits)
    return interpolate(np.stack(sums), [i + 1 for i in chosen]).astype("<u4")


@dataclass(frozen=True)
class Done:
    """total `[D]` over the clients in `survivors`. shares: by client, the share `[D]` that the last server
    holds. sent: bytes that each client sent."""

    total: np.ndarray
    survivors: tuple[int, ...]
    shares: Mapping[int, np.ndarray]
    sent: Mapping[int, int]


def run(
    inputs: Mapping[int, np.ndarray],
    terms: Terms,
    reached: Mapping[int, Collection[int]] | None = None,
    weights: Mapping[int, int] | None = None,
    up: Sequence[int] | None = None,
) -> Done:
    """A whole session.

    reached: by client, the servers that its messages reach (all, where it is not named). up: the servers
    that are still there when totals are published (None: all). Raises TooFew where clients or servers are
    too few.
    """
    servers = [Server(i, terms, weights) for i in range(terms.servers)]
    sent = {}
    for client, words in inputs.items():
        messages = client_messages(client, words, terms)
        there = range(terms.servers) if reached is None else reached.get(client, range(terms.servers))
        sent[client] = sum(len(messages[i]) for i in there)
        for i in there:
            servers[i].receive(client, messages[i])
    heard = {s.index: s.heard() for s in servers}
    agreed = {s.agree({i: m for i, m in heard.items() if i != s.index}) for s in servers}
    assert len(agreed) == 1, "servers that heard the same agree"
    totals = {i: servers[i].total() for i in (range(terms.servers) if up is None else up)}
    survivors = tuple(sorted(agreed.pop()))
    shares = {c: servers[-1].share_of(c) for c in survivors}
    return Done(reconstruct(totals, terms), survivors, shares, sent)


def _expanded(seed: bytes, terms: Terms) -> np.ndarray:
    mask = np.zeros(terms.dim, word(terms.bits))
    add_mask(mask, seed)
    return reduce(mask, terms.bits)
