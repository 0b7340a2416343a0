"""The client of ePrint 2017/281, Figure 4, over the graph of its terms."""

from __future__ import annotations

from collections.abc import Sequence
from secrets import token_bytes

import numpy as np

from fltoolkit.secagg import parties, shamir
from fltoolkit.secagg.bonawitz import KEYS, SEALED, SHARE_BYTES, SHARES, SIGNATURES, SIGNED_KEYS, Terms
from fltoolkit.secagg.errors import Forged, Inconsistent, TooFew
from fltoolkit.secagg.keys import KeyPair, Signer, commitment, seal, unseal
from fltoolkit.secagg.parties import Step, bitmap, members_in
from fltoolkit.secagg.wire import HEADER_BYTES, pack_records, unpack_records
from fltoolkit.secagg.words import SEED_BYTES, add_mask, pack, reduce

CIPHER = b"fltoolkit secagg share encryption v1"
PAIR = b"fltoolkit secagg pairwise mask v1"


class Client(parties.Client):
    """One client of one session.

    identity: its number among the graph's members. words `[D]`: its input modulo 2^b, which is left as it is.
    broadcast: a hash of the model that it received; keys are bound to it, so that the shares and masks of
    clients who were sent different models do not fit each other. signer: its long-term key in signed
    sessions.
    """

    def __init__(
        self,
        identity: int,
        words: np.ndarray,
        terms: Terms,
        broadcast: bytes = b"",
        signer: Signer | None = None,
    ) -> None:
        super().__init__(identity, terms.wire, signer)
        self.terms, self._words, self._broadcast = terms, words, broadcast
        self._cipher, self._mask = KeyPair(), KeyPair()
        self._seed = token_bytes(SHARE_BYTES)
        self._peers: dict[int, tuple[bytes, ...]] = {}
        self._senders: frozenset[int] = frozenset()
        self._held: dict[int, bytes] = {}
        self._survivors: frozenset[int] = frozenset()

    def steps(self) -> Sequence[Step]:
        confirm = [self._confirm] if self.terms.signed else []
        return [self._advertise, self._share, self._masked_input, *confirm, self._unmask]

    def _advertise(self, body: bytes) -> bytes:
        return self._cipher.public + self._mask.public

    def _share(self, body: bytes) -> bytes:
        """Check the peers' keys, and give each holder a share of both secrets."""
        near = set(self.terms.graph.neighbours(self.identity))
        self._peers = unpack_records(SIGNED_KEYS if self.terms.signed else KEYS, body)
        if not set(self._peers) <= near:
            raise Inconsistent("keys must be those of neighbours")
        self._enough(len(self._holders_in(set(self._peers))), "neighbours with keys")
        own = (self._cipher.public, self._mask.public)
        keys = [k for record in (own, *self._peers.values()) for k in record[:2]]
        if len(set(keys)) < len(keys):
            raise Inconsistent("keys must be different from each other")
        if self.terms.signed:
            for peer, (cipher, mask, signature) in self._peers.items():
                self.wire.vouch(peer, self.wire.pack(0, peer, cipher + mask), signature)
        return commitment(self._seed, self.wire.context(b"", self.identity)) + self._sealed_shares()

    def _sealed_shares(self) -> bytes:
        terms = self.terms
        holders = terms.holders(self.identity)
        points = [terms.point(h) for h in holders]
        secrets = (self._mask.private, self._seed)
        shared = [shamir.share(int.from_bytes(s, "little"), terms.threshold, points) for s in secrets]
        plain = {
            h: key.to_bytes(SHARE_BYTES, "little") + seed.to_bytes(SHARE_BYTES, "little")
            for h, key, seed in zip(holders, *shared, strict=True)
        }
        if self.identity in plain:
            self._held[self.identity] = plain[self.identity]
        sealed = {}
        for peer in self._peers:
            context = self._context(self.identity, peer)
            sealed[peer] = (seal(self._channel(peer, context), plain[peer], context),)
        return pack_records(SEALED, sealed)

    def _masked_input(self, body: bytes) -> bytes | memoryview | bytearray:
        """Take in the shares that are meant for this client, and send the input under all masks."""
        given = unpack_records(SEALED, body)
        if not set(given) <= set(self._peers):
            raise Inconsistent("shares must be those of neighbours whose keys are known")
        self._senders = frozenset(given)
        self._take_in(given)
        room = bytearray(HEADER_BYTES + self._words.nbytes)
        masked = np.frombuffer(room, self._words.dtype, offset=HEADER_BYTES)
        masked[:] = self._words
        add_mask(masked, self._seed[:SEED_BYTES])
        for peer in given:
            low, high = sorted((self.identity, peer))
            seed = self._mask.agree(self._peers[peer][1], PAIR, self._context(low, high), SEED_BYTES)
            add_mask(masked, seed, subtract=self.identity > peer)
        reduce(masked, self.terms.bits)
        return room if self.terms.bits == 8 * masked.itemsize else pack(masked, self.terms.bits)

    def _take_in(self, given: dict[int, tuple[bytes, ...]]) -> None:
        """Decrypt the shares. One that does not verify is not held; where that leaves too few, as when
        neighbours received another broadcast, no input is sent."""
        for peer, (sealed,) in given.items():
            context = self._context(peer, self.identity)
            try:
                self._held[peer] = unseal(self._channel(peer, context), sealed, context)
            except Forged:
                continue
        self._enough(len(self._holders_in(set(self._held))), "neighbours with shares that verify")

    def _confirm(self, body: bytes) -> bytes:
        """Sign the set of survivors, which is how clients see whether all were told the same one."""
        self._accept(body)
        return body

    def _unmask(self, body: bytes) -> bytes:
        """Reveal of each peer one share: of its seed where it survives, of its key where it does not."""
        if self.terms.signed:
            self._compare(body)
        else:
            self._accept(body)
        return pack_records(
            SHARES,
            {
                peer: (held[SHARE_BYTES:] if peer in self._survivors else held[:SHARE_BYTES],)
                for peer, held in self._held.items()
            },
        )

    def _accept(self, body: bytes) -> None:
        """The survivors that this client will reveal shares for, once and for all."""
        survivors = members_in(self.terms.graph.members, body)
        near = survivors & set(self.terms.graph.neighbours(self.identity))
        if self.identity not in survivors or not near <= self._senders:
            raise Inconsistent("survivors must be clients whose shares were sent, oneself among them")
        self._enough(len(self._holders_in(set(near))), "surviving neighbours")
        if len(survivors) < self.terms.least:
            raise TooFew(f"survivors must be at least {self.terms.least} clients, got {len(survivors)}")
        self._survivors = survivors

    def _compare(self, body: bytes) -> None:
        signatures = unpack_records(SIGNATURES, body)
        if not set(signatures) <= self._survivors:
            raise Inconsistent("signatures must be those of survivors")
        self._enough(len(signatures), "survivors that signed the set of survivors")
        same = bitmap(self.terms.graph.members, self._survivors)
        for peer, (signature,) in signatures.items():
            self.wire.vouch(peer, self.wire.pack(self._signing_round, peer, same), signature)

    @property
    def _signing_round(self) -> int:
        return self.terms.rounds.index("consistency check")

    def _holders_in(self, peers: set[int]) -> set[int]:
        return (peers | {self.identity}) & set(self.terms.holders(self.identity))

    def _enough(self, number: int, what: str) -> None:
        if number < self.terms.threshold:
            raise TooFew(f"{what} must be at least {self.terms.threshold}, got {number}")

    def _channel(self, peer: int, context: bytes) -> bytes:
        return self._cipher.agree(self._peers[peer][0], CIPHER, context)

    def _context(self, *clients: int) -> bytes:
        return self.wire.context(self._broadcast, *clients)
