"""Keys of a session: agreement, derivation, encryption from client to client, signatures.

All of it is the `cryptography` package's: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC
8439), Ed25519 (RFC 8032). Every derived key is bound to a label, the session, the broadcast that its owner
received and both ends, in order where direction matters.
"""

from __future__ import annotations

from hashlib import sha256

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fltoolkit.secagg.errors import Forged

KEY_BYTES = 32
"""Of a public key, a private key and a key of the cipher."""
TAG_BYTES = 16
SIGNATURE_BYTES = 64

_ONCE = bytes(12)


class KeyPair:
    """An X25519 key pair; `private` fixes it, as when a server rebuilds one from shares."""

    def __init__(self, private: bytes | None = None) -> None:
        make = X25519PrivateKey
        self._key = make.generate() if private is None else make.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()

    @property
    def private(self) -> bytes:
        return self._key.private_bytes_raw()

    def agree(self, public: bytes, label: bytes, context: bytes, length: int = KEY_BYTES) -> bytes:
        """A key of `length` bytes that the owner of `public` derives too. Raises Forged where `public` is no
        key, or one for which every secret is the same."""
        try:
            secret = self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise Forged("a public key must be a point of full order") from None
        return HKDF(SHA256(), length, salt=None, info=label + b"|" + context).derive(secret)


def seal(key: bytes, plain: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate `plain` with its context. A key encrypts one message only, so that its nonce
    may be zero."""
    return ChaCha20Poly1305(key).encrypt(_ONCE, plain, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """What was sealed under the same key and context; raises Forged where anything differs."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, sealed, context)
    except InvalidTag:
        raise Forged("an encrypted message must carry the tag of its key and context") from None


class Signer:
    """A client's long-term Ed25519 key. Everybody knows `public` beforehand, from whoever vouches for
    clients and is not the server."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


def verify(public: bytes, message: bytes, signature: bytes) -> None:
    """Raises Forged where `signature` is not that of the owner of `public` under `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        raise Forged("a message must carry its sender's signature") from None


def commitment(secret: bytes, context: bytes) -> bytes:
    """A hash that fixes a random secret of 256 bits and does not tell it."""
    return sha256(b"fltoolkit secagg commitment v1|" + context + b"|" + secret).digest()
