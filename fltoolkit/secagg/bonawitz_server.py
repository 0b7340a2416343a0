"""The server of ePrint 2017/281, Figure 4, over the graph of its terms."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fltoolkit.secagg import parties, shamir
from fltoolkit.secagg.bonawitz import KEYS, SEALED, SHARE_BYTES, SHARES, SIGNATURES, SIGNED_KEYS, Terms
from fltoolkit.secagg.bonawitz_client import PAIR
from fltoolkit.secagg.errors import Forged, Inconsistent, Malformed, TooFew
from fltoolkit.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, KeyPair, commitment
from fltoolkit.secagg.parties import Closing, Take, bitmap
from fltoolkit.secagg.wire import pack_records, unpack_records
from fltoolkit.secagg.words import SEED_BYTES, add_mask, reduce, unpack, word

COMMITMENT_BYTES = 32


class Server(parties.Server):
    """The server of one session. It holds one vector, to which it adds inputs as they come.

    broadcast: the hash of the model that it sent. workers: threads that expand the masks left in the sum.
    """

    def __init__(self, terms: Terms, broadcast: bytes = b"", workers: int = 1) -> None:
        super().__init__(terms.wire, terms.graph.members, terms.rounds)
        self.terms, self._broadcast, self._workers = terms, broadcast, workers
        self._keys: dict[int, tuple[bytes, ...]] = {}
        self._commitments: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, tuple[bytes, ...]]] = {}
        self._signatures: dict[int, tuple[bytes, ...]] = {}
        self._shares: dict[int, dict[int, int]] = {}
        self._sum = np.zeros(terms.dim, word(terms.bits))

    def steps(self) -> Sequence[tuple[Take, Closing]]:
        confirm = [(self._take_signature, self._forward_signatures)] if self.terms.signed else []
        return [
            (self._take_keys, self._forward_keys),
            (self._take_shares, self._forward_shares),
            (self._take_input, self._name_survivors),
            *confirm,
            (self._take_unmasking, self._unmask),
        ]

    def needed(self) -> int:
        t = self.terms.threshold
        return t if self.is_last_round else max(self.terms.least, t)

    def total(self) -> np.ndarray:
        """The survivors' sum `[D]` modulo 2^b."""
        assert self._round == len(self.rounds), "the session is not over"
        return self._sum

    def _take_keys(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        if len(body) != 2 * KEY_BYTES:
            raise Malformed(f"two public keys must be {2 * KEY_BYTES} bytes, got {len(body)}")
        pair = (bytes(body[:KEY_BYTES]), bytes(body[KEY_BYTES:]))
        for public in pair:  # one with which no peer could agree on a secret is refused here
            KeyPair().agree(public, PAIR, b"")
        self._keys[client] = (*pair, bytes(message[-SIGNATURE_BYTES:])) if self.terms.signed else pair

    def _forward_keys(self, answered: frozenset[int]) -> dict[int, bytes]:
        kind = SIGNED_KEYS if self.terms.signed else KEYS
        return {
            c: self.message(pack_records(kind, {v: self._keys[v] for v in self._near(c) if v in answered}))
            for c in answered
        }

    def _take_shares(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        sealed = unpack_records(SEALED, body[COMMITMENT_BYTES:])
        wanted = {v for v in self._near(client) if v in self._keys}
        if set(sealed) != wanted:
            raise Malformed("shares must be for the neighbours whose keys were sent")
        self._commitments[client] = bytes(body[:COMMITMENT_BYTES])
        self._sealed[client] = sealed

    def _forward_shares(self, answered: frozenset[int]) -> dict[int, bytes]:
        found = {}
        for c in answered:
            near = (v for v in self._near(c) if v in answered)
            found[c] = self.message(pack_records(SEALED, {v: self._sealed[v][c] for v in near}))
        return found

    def _take_input(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        self._sum += unpack(body, self.terms.dim, self.terms.bits)

    def _name_survivors(self, answered: frozenset[int]) -> dict[int, bytes]:
        self.survivors = tuple(sorted(answered))
        return self.to_all(answered, bitmap(self.members, answered))

    def _take_signature(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        if bytes(body) != bitmap(self.members, self.survivors):
            raise Inconsistent("a client must sign the survivors that it was told")
        self._signatures[client] = (bytes(message[-SIGNATURE_BYTES:]),)

    def _forward_signatures(self, answered: frozenset[int]) -> dict[int, bytes]:
        return self.to_all(answered, pack_records(SIGNATURES, self._signatures))

    def _take_unmasking(self, client: int, body: memoryview, message: bytes | bytearray) -> None:
        shares = unpack_records(SHARES, body)
        if not set(shares) <= {v for v in (*self._near(client), client) if v in self._sealed}:
            raise Malformed("shares must be of secrets that the client holds")
        point = self.terms.point(client)
        for peer, (value,) in shares.items():
            self._shares.setdefault(peer, {})[point] = int.from_bytes(value, "little")

    def _unmask(self, answered: frozenset[int]) -> dict[int, bytes]:
        """Take the masks that are left out of the sum: survivors' own, and those shared with who is gone."""
        masks = []
        for c in self._sealed:
            masks += [self._own_mask(c)] if c in self.survivors else self._pairs_of(c)
        self._add(masks)
        reduce(self._sum, self.terms.bits)
        return {}

    def _secret(self, client: int) -> bytes:
        shares = self._shares.get(client, {})
        t = self.terms.threshold
        if len(shares) < t:
            raise TooFew(f"shares of a secret of client {client} must be at least {t}, got {len(shares)}")
        points = sorted(shares)[:t]
        return shamir.combine(points, [shares[p] for p in points]).to_bytes(SHARE_BYTES, "little")

    def _own_mask(self, survivor: int) -> tuple[bytes, bool]:
        secret = self._secret(survivor)
        if commitment(secret, self.wire.context(b"", survivor)) != self._commitments[survivor]:
            raise Forged(f"shares must give the mask's seed that client {survivor} committed to")
        return secret[:SEED_BYTES], True

    def _pairs_of(self, gone: int) -> list[tuple[bytes, bool]]:
        """The masks that a client who is gone shares with survivors, as they stand in the sum: what
        survivor v added is subtracted where v < gone."""
        near = [v for v in self._near(gone) if v in self.survivors]
        if not near:
            return []
        key = KeyPair(self._secret(gone))
        if key.public != self._keys[gone][1]:
            raise Forged(f"shares must give the private key of client {gone}")
        found = []
        for v in near:
            context = self.wire.context(self._broadcast, *sorted((gone, v)))
            found.append((key.agree(self._keys[v][1], PAIR, context, SEED_BYTES), v < gone))
        return found

    def _add(self, masks: Sequence[tuple[bytes, bool]]) -> None:
        """Add or subtract masks, over as many slices of them as there are workers."""
        if self._workers == 1:
            for seed, subtract in masks:
                add_mask(self._sum, seed, subtract)
            return

        def part(some: Sequence[tuple[bytes, bool]]) -> np.ndarray:
            found = np.zeros_like(self._sum)
            for seed, subtract in some:
                add_mask(found, seed, subtract)
            return found

        with ThreadPoolExecutor(self._workers) as pool:
            for found in pool.map(part, [masks[i :: self._workers] for i in range(self._workers)]):
                self._sum += found

    def _near(self, client: int) -> tuple[int, ...]:
        return self.terms.graph.neighbours(client)
