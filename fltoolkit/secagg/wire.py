"""What a message looks like: a fixed header, a body of fixed-size records, and in signed sessions its
sender's signature over both."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fltoolkit.secagg.errors import Forged, Malformed, OutOfOrder, Replayed
from fltoolkit.secagg.keys import SIGNATURE_BYTES, Signer, verify

SERVER = 0xFFFFFFFF
"""The sender of the server's messages; clients are numbered below it."""
SESSION_BYTES = 16

_HEADER = struct.Struct("<4sBB16sI6x")
HEADER_BYTES = _HEADER.size
"""A multiple of the largest word, so that words behind it are aligned."""
_MAGIC = b"FLSA"
_VERSION = 1


@dataclass(frozen=True)
class Wire:
    """How the parties of one session write and read messages.

    session: 16 bytes that no other session has. verifiers: the public key of every client where clients sign
    all they send, else None: then what comes from a client is trusted to be its own, as over TLS.
    """

    session: bytes
    verifiers: Mapping[int, bytes] | None = None

    def context(self, broadcast: bytes, *clients: int) -> bytes:
        """What keys are bound to: session, broadcast as the deriving client received it, both ends."""
        return b"|".join([self.session, broadcast, *(b"%d" % c for c in clients)])

    def pack(self, number: int, sender: int, body: bytes | memoryview, signer: Signer | None = None) -> bytes:
        """The message of `sender` in round `number`."""
        data = b"".join((self._header(number, sender), body))
        return data if signer is None else data + signer.sign(data)

    def fill(self, room: bytearray, number: int, sender: int) -> None:
        """Write the header of a message whose body is in its place already, behind room for the header."""
        room[:HEADER_BYTES] = self._header(number, sender)

    def _header(self, number: int, sender: int) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, number, self.session, sender)

    def unpack(self, data: bytes | bytearray, number: int, sender: int) -> memoryview:
        """The body of a message that must be of round `number` and come from `sender`.

        Raises Malformed, Replayed (of another session), OutOfOrder (of another round or sender) or Forged.
        """
        if len(data) < HEADER_BYTES:
            raise Malformed(f"a message must have at least {HEADER_BYTES} bytes, got {len(data)}")
        magic, version, its_round, session, its_sender = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise Malformed(f"a message must begin with {_MAGIC!r} and version {_VERSION}")
        if session != self.session:
            raise Replayed("a message must be of this session")
        if (its_round, its_sender) != (number, sender):
            raise OutOfOrder(
                f"a message must be of round {number} and sender {sender}, got {its_round} and {its_sender}"
            )
        if sender == SERVER or self.verifiers is None:
            return memoryview(data)[HEADER_BYTES:]
        return self._verified(data, sender)

    def _verified(self, data: bytes | bytearray, sender: int) -> memoryview:
        if len(data) < HEADER_BYTES + SIGNATURE_BYTES:
            raise Malformed("a client's message must be signed in this session")
        self.vouch(sender, bytes(data[:-SIGNATURE_BYTES]), bytes(data[-SIGNATURE_BYTES:]))
        return memoryview(data)[HEADER_BYTES:-SIGNATURE_BYTES]

    def vouch(self, client: int, signed: bytes, signature: bytes) -> None:
        """Raises Forged unless `client` signed these bytes."""
        assert self.verifiers is not None
        if client not in self.verifiers:
            raise Forged(f"client {client} must have a public key that is known beforehand")
        verify(self.verifiers[client], signed, signature)


def records(*columns: tuple[str, int]) -> np.dtype:
    """Records of a client's number `id` and columns of so many bytes each."""
    return np.dtype([("id", "<u4"), *((name, f"V{size}") for name, size in columns)])


def pack_records(kind: np.dtype, rows: Mapping[int, tuple[bytes, ...]]) -> bytes:
    """Records by client, in ascending order."""
    return np.array([(c, *rows[c]) for c in sorted(rows)], kind).tobytes()


def unpack_records(kind: np.dtype, body: bytes | memoryview) -> dict[int, tuple[bytes, ...]]:
    """The records by client. Raises Malformed where bytes are missing or left over, or the clients are not in
    ascending order, each once."""
    if len(body) % kind.itemsize:
        raise Malformed(f"records must be multiples of {kind.itemsize} bytes, got {len(body)}")
    found = np.frombuffer(body, kind)
    ids = found["id"]
    if (ids[1:] <= ids[:-1]).any():
        raise Malformed("records must be in ascending order of clients, each once")
    names = [n for n in kind.names or () if n != "id"]
    columns = [[bytes(v) for v in found[n]] for n in names]
    return dict(zip(ids.tolist(), zip(*columns, strict=True), strict=True))
