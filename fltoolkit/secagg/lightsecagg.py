"""LightSecAgg: the sum of the masks in one shot, whoever dropped out.

So et al. 2022, arXiv:2109.14236, Algorithm 1. Every client adds one mask of its own to its input and gives
every other client a coded share of that mask (`fltoolkit.secagg.coded_mask`). The server never asks for a
single mask: each survivor adds up the shares of the survivors' masks that it holds, and any U of these sums
decode to the sum of the masks. The server is honest but curious, and up to T clients tell it what they
hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_bytes

import numpy as np

from fltoolkit.errors import require
from fltoolkit.secagg import parties
from fltoolkit.secagg.coded_mask import decode, encode, piece_size
from fltoolkit.secagg.errors import Forged, Inconsistent, Malformed, TooFew
from fltoolkit.secagg.keys import KEY_BYTES, TAG_BYTES, KeyPair, seal, unseal
from fltoolkit.secagg.parties import Closing, Step, Take, bitmap, members_in
from fltoolkit.secagg.prime_field import PRIME, uniform
from fltoolkit.secagg.wire import Wire, pack_records, records, unpack_records
from fltoolkit.secagg.words import SEED_BYTES, add_mask

ROUNDS = ("advertise keys", "share masks", "masked input", "recover")
CIPHER = b"fltoolkit lightsecagg share encryption v1"
KEYS = records(("cipher", KEY_BYTES))
WORD = np.dtype("<u4")


@dataclass(frozen=True)
class Terms:
    """The public terms of a session.

    members: the clients in order. needed: U, the survivors without whom there is no sum. private: T < U, how
    many clients may collude with the server. dim: D values modulo 2^32 - 5.
    """

    wire: Wire
    members: tuple[int, ...]
    needed: int
    private: int
    dim: int

    def __post_init__(self) -> None:
        n = len(self.members)
        require(self.dim >= 1, "dim", ">= 1", self.dim)
        require(len(set(self.members)) == n, "members", "distinct", self.members)
        require(1 <= self.needed <= n, "needed", f"from 1 to {n} clients", self.needed)
        require(0 <= self.private < self.needed, "private", f"from 0 to {self.needed - 1}", self.private)

    @property
    def size(self) -> int:
        """Words of a share."""
        return piece_size(self.dim, self.needed, self.private)

    @property
    def sealed(self) -> np.dtype:
        """The record of an encrypted share."""
        return records(("sealed", self.size * WORD.itemsize + TAG_BYTES))

    def point(self, client: int) -> int:
        return self.members.index(client) + 1

    def words(self, body: bytes | memoryview, size: int) -> np.ndarray:
        """Words below the prime; raises Malformed where there are not `size` of them."""
        if len(body) != size * WORD.itemsize:
            raise Malformed(f"{size} words must be {size * WORD.itemsize} bytes, got {len(body)}")
        found = np.frombuffer(body, WORD)
        if (found >= PRIME).any():
            raise Malformed(f"words must be below {PRIME}")
        return found.astype(np.uint64)


class Client(parties.Client):
    """One client of one session. words `[D]`: its input modulo 2^32 - 5. broadcast: a hash of the model
    that it received, to which its keys are bound."""

    def __init__(self, identity: int, words: np.ndarray, terms: Terms, broadcast: bytes = b"") -> None:
        super().__init__(identity, terms.wire)
        self.terms, self._words, self._broadcast = terms, words, broadcast
        self._cipher = KeyPair()
        self._mask = np.empty(0, np.uint64)
        self._peers: dict[int, tuple[bytes, ...]] = {}
        self._held: dict[int, np.ndarray] = {}

    def steps(self) -> Sequence[Step]:
        return [self._advertise, self._share, self._masked_input, self._recover]

    def _advertise(self, body: bytes) -> bytes:
        return self._cipher.public

    def _share(self, body: bytes) -> bytes:
        """Draw the mask and give every peer its encrypted share."""
        terms = self.terms
        self._peers = unpack_records(KEYS, body)
        if not set(self._peers) <= set(terms.members) - {self.identity}:
            raise Inconsistent("keys must be those of other members")
        self._enough(1 + len(self._peers), "clients with keys")
        self._mask = uniform(fresh_words, terms.dim)
        noise = uniform(fresh_words, terms.private * terms.size).reshape(terms.private, terms.size)
        holders = sorted((*self._peers, self.identity))
        shares = encode(self._mask, noise, [terms.point(h) for h in holders], terms.needed).astype(WORD)
        sealed = {}
        for holder, share in zip(holders, shares, strict=True):
            if holder == self.identity:
                self._held[holder] = share.astype(np.uint64)
            else:
                context = self.wire.context(self._broadcast, self.identity, holder)
                sealed[holder] = (seal(self._channel(holder, context), share.tobytes(), context),)
        return pack_records(terms.sealed, sealed)

    def _masked_input(self, body: bytes) -> bytes:
        """Take in the shares of the others' masks, and send the input under the own one. A share that does
        not verify is not held."""
        given = unpack_records(self.terms.sealed, body)
        if not set(given) <= set(self._peers):
            raise Inconsistent("shares must be those of peers whose keys are known")
        for peer, (sealed,) in given.items():
            context = self.wire.context(self._broadcast, peer, self.identity)
            try:
                share = unseal(self._channel(peer, context), sealed, context)
                self._held[peer] = self.terms.words(share, self.terms.size)
            except (Forged, Malformed):
                continue
        self._enough(len(self._held), "clients with shares that verify")
        return ((self._words + self._mask) % np.uint64(PRIME)).astype(WORD).tobytes()

    def _recover(self, body: bytes) -> bytes:
        """The sum of the survivors' shares held here."""
        survivors = members_in(self.terms.members, body)
        if self.identity not in survivors or not survivors <= set(self._held):
            raise Inconsistent("survivors must be clients whose shares are held, oneself among them")
        self._enough(len(survivors), "survivors")
        total = np.zeros(self.terms.size, np.uint64)
        for peer in survivors:
            total += self._held[peer]
        return (total % np.uint64(PRIME)).astype(WORD).tobytes()

    def _enough(self, number: int, what: str) -> None:
        if number < self.terms.needed:
            raise TooFew(f"{what} must be at least {self.terms.needed}, got {number}")

    def _channel(self, peer: int, context: bytes) -> bytes:
        return self._cipher.agree(self._peers[peer][0], CIPHER, context)


class Server(parties.Server):
    """The server of one session."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms.wire, terms.members, ROUNDS)
        self.terms = terms
        self._keys: dict[int, tuple[bytes, ...]] = {}
        self._sealed: dict[int, dict[int, tuple[bytes, ...]]] = {}
        self._sums: dict[int, np.ndarray] = {}
        self._sum: np.ndarray = np.zeros(terms.dim, np.uint64)

    def steps(self) -> Sequence[tuple[Take, Closing]]:
        return [
            (self._take_key, self._forward_keys),
            (self._take_shares, self._forward_shares),
            (self._take_input, self._name_survivors),
            (self._take_sum, self._recover),
        ]

    def needed(self) -> int:
        return self.terms.needed

    def total(self) -> np.ndarray:
        """The survivors' sum `[D]` modulo 2^32 - 5."""
        assert self._round == len(self.rounds), "the session is not over"
        return self._sum

    def _take_key(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        """Refuses, as Forged, a key with which no peer could agree on another and would step back."""
        if len(body) != KEY_BYTES:
            raise Malformed(f"a public key must be {KEY_BYTES} bytes, got {len(body)}")
        KeyPair().agree(bytes(body), CIPHER, b"")
        self._keys[client] = (bytes(body),)

    def _forward_keys(self, answered: frozenset[int]) -> dict[int, bytes]:
        return {
            c: self.message(pack_records(KEYS, {v: self._keys[v] for v in answered if v != c}))
            for c in answered
        }

    def _take_shares(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        sealed = unpack_records(self.terms.sealed, body)
        if set(sealed) != set(self._keys) - {client}:
            raise Malformed("shares must be for all other clients whose keys were sent")
        self._sealed[client] = sealed

    def _forward_shares(self, answered: frozenset[int]) -> dict[int, bytes]:
        found = {}
        for c in answered:
            given = {v: self._sealed[v][c] for v in answered if v != c}
            found[c] = self.message(pack_records(self.terms.sealed, given))
        self._sealed.clear()
        return found

    def _take_input(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        self._sum = (self._sum + self.terms.words(body, self.terms.dim)) % np.uint64(PRIME)

    def _name_survivors(self, answered: frozenset[int]) -> dict[int, bytes]:
        self.survivors = tuple(sorted(answered))
        return self.to_all(answered, bitmap(self.members, answered))

    def _take_sum(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        self._sums[client] = self.terms.words(body, self.terms.size)

    def _recover(self, answered: frozenset[int]) -> dict[int, bytes]:
        """Decode the sum of the masks from U of the answers, and take it out of the sum of the inputs. Where
        there are more, the last U must give the same: a wrong answer among them raises Forged."""
        holders, needed = sorted(answered), self.terms.needed
        mask = self._decoded(holders[:needed])
        if len(holders) > needed and (self._decoded(holders[-needed:]) != mask).any():
            raise Forged("sums of shares must be of the same masks")
        self._sum = (self._sum + (np.uint64(PRIME) - mask)) % np.uint64(PRIME)
        return {}

    def _decoded(self, holders: Sequence[int]) -> np.ndarray:
        shares = np.stack([self._sums[c] for c in holders])
        points = [self.terms.point(c) for c in holders]
        return decode(shares, points, self.terms.dim, self.terms.private)


def fresh_words(count: int) -> np.ndarray:
    """So many uniform 32-bit words that nobody else has: a keystream under a new seed."""
    words = np.zeros(count, WORD)
    add_mask(words, token_bytes(SEED_BYTES))
    return words
