"""Secure aggregation by pairwise masks.

Bonawitz et al. 2017, ePrint 2017/281, section 4 ("masking with one-time pads"): every pair of clients agrees
on a seed, expands it to a mask of D uniform numbers modulo 2^b, and one adds what the other subtracts.
Each message alone is uniform; in the sum all masks cancel and the server reads Σ w_k Δ_k exactly as
encoded. Seeds are agreed by X25519 and derived by HKDF-SHA256; masks are AES-256-CTR keystreams.

This is that section's first step, without dropouts: every client that advertised a key must send its
message. There are no self-masks and no Shamir shares, so a missing message makes the sum unreadable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log2
from typing import ClassVar

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext
from fltoolkit.errors import InputError, require

LABEL = b"fltoolkit secagg pairwise mask v1"


@dataclass(frozen=True)
class SecAgg(Defense):
    """Hide every message behind masks that cancel in the sum; exact modular sum, no ε by itself.

    clients: the cohort size K it insists on (None: any); K = 1 has nothing to hide behind. bits: b, the
    arithmetic is modulo 2^b, 16 to 64. range: bound on the absolute value of an update's coordinates;
    a larger one is refused, never clipped. The decoded mean is within K / (2 · scale) of the real one,
    up to the rounding of float64 and of the rows' own type.
    """

    name: ClassVar[str] = "secagg"
    hides_messages: ClassVar[bool] = True
    aliases: ClassVar[Mapping[str, str]] = {"clients": "cohort", "range": "value_range"}
    cohort: int | None = None
    bits: int = 32
    value_range: float = 8.0

    def __post_init__(self) -> None:
        require(self.cohort is None or self.cohort >= 1, "clients", ">= 1", self.cohort)
        require(self.bits in range(16, 65), "bits", "an integer from 16 to 64", self.bits)
        good = isfinite(self.value_range) and self.value_range >= 1e-30
        require(good, "range", "a finite number >= 1e-30", self.value_range)

    @property
    def wanted_cohort(self) -> int | None:
        return self.cohort

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        if None not in (self.cohort, cohort) and self.cohort != cohort:
            raise InputError(f"secagg:clients must equal the round's cohort of {cohort}, got {self.cohort}")

    def secure_sum(self, rows: Tensor, ctx: RoundContext) -> tuple[Tensor, Tensor]:
        """Masked messages as int64 `[K, D]` and the decoded weighted mean `[D]`, like the rows.

        The int64 holds the integer modulo 2^b; for b = 64 it is the same bit pattern read as signed.
        The weights are renormalised in float64: in float32 they sum to 1 only up to rounding. A Poisson
        cohort's weights sum to something else, by which the decoded mean is multiplied.
        """
        if ctx.sampling.kind != "poisson":  # whose size is random
            self.check(ctx.sensitivity, len(rows))
        if not len(rows):
            return torch.zeros_like(rows, dtype=torch.int64), rows.sum(0)
        require(len(set(ctx.clients)) == len(rows), "clients of a round", "distinct", ctx.clients)
        self._refuse_out_of_range(rows, ctx.clients)
        scale = self.scale(len(rows))
        size = float(ctx.weights.double().sum()) if ctx.sampling.kind == "poisson" else 1.0
        weights = ctx.weights.double() / ctx.weights.double().sum()
        members = [Member(c) for c in ctx.clients]
        keys = [m.public_key for m in members]
        messages = [
            m.message(encode(row * w, scale, self.bits), keys, ctx.clients, ctx.round, self.bits)
            for m, row, w in zip(members, _doubles(rows), weights.tolist(), strict=True)
        ]
        total = size * decode(server_sum(messages), scale, self.bits)
        sent = np.stack(messages).astype(np.int64)
        return torch.from_numpy(sent).to(rows.device), torch.from_numpy(total).to(rows)

    def scale(self, cohort: int) -> float:
        """Integers per unit: K times a power of two. With |Δ| ≤ range and weights that sum to 1, rounding
        each of K terms by at most 1/2 keeps the sum within range · scale + K / 2 < 2^(b-1): it cannot wrap.
        The factor below 1 covers the floating-point error of the weights' sum. The form encodes integers
        times a power of two γ ≥ K / scale exactly under equal weights, so that the masked sum is a function
        of the integers' sum alone (see `fltoolkit.integer_domain`)."""
        room = 2 ** (self.bits - 1) - 2 - cohort
        require(room > 0, "bits", f"large enough to add up {cohort} clients", self.bits)
        return cohort * 2.0 ** floor(log2(room * (1 - 2**-40) / (self.value_range * cohort)))

    def _refuse_out_of_range(self, rows: Tensor, clients: Sequence[int]) -> None:
        largest = rows.abs().amax(dim=1)
        for client, value in zip(clients, largest.tolist(), strict=True):
            require(isfinite(value), f"update of client {client}", "finite", value)
            if value > self.value_range:
                raise InputError(
                    f"secagg:range must be at least the largest update entry, {value} of client "
                    f"{client}, got {self.value_range}"
                )


class Member:
    """One client's side: its key pair for this round, and its masked message."""

    def __init__(self, identity: int) -> None:
        self.identity = identity
        self._key = X25519PrivateKey.generate()
        self.public_key = self._key.public_key().public_bytes_raw()

    def message(
        self, plain: np.ndarray, keys: Sequence[bytes], identities: Sequence[int], number: int, bits: int
    ) -> np.ndarray:
        """The encoded update plus the masks shared with later members, minus those with earlier ones."""
        masked = plain.copy()
        for other, key in zip(identities, keys, strict=True):
            if other == self.identity:
                continue
            mask = self._mask(other, key, number, plain)
            if self.identity < other:
                masked += mask
            else:
                masked -= mask
        return reduce(masked, bits)

    def _mask(self, other: int, key: bytes, number: int, like: np.ndarray) -> np.ndarray:
        secret = self._key.exchange(X25519PublicKey.from_public_bytes(key))
        low, high = sorted((self.identity, other))
        context = b"|".join([LABEL, *(str(n).encode() for n in (number, low, high, like.itemsize))])
        seed = HKDF(SHA256(), length=32, salt=None, info=context).derive(secret)
        return expand(seed, like)


def expand(seed: bytes, like: np.ndarray) -> np.ndarray:
    """Uniform words in the shape and type of `like`: the AES-256-CTR keystream of `seed`. A seed is used
    once, so the counter may start at zero. A uniform word is also uniform modulo 2^b."""
    cipher = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(cipher.update(bytes(like.nbytes)), like.dtype)


def encode(values: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """Fixed point: round(value · scale) modulo 2^b."""
    return reduce(np.rint(values * scale).astype(np.int64).astype(word(bits)), bits)


def word(bits: int) -> np.dtype:
    """The smallest unsigned little-endian word that holds b bits. 2^b divides its modulus, so adding
    words and reducing at the end is adding modulo 2^b."""
    return np.min_scalar_type(2**bits - 1).newbyteorder("<")


def reduce(words: np.ndarray, bits: int) -> np.ndarray:
    """Words modulo 2^b."""
    return words & words.dtype.type(2**bits - 1)


def server_sum(messages: Sequence[np.ndarray]) -> np.ndarray:
    """All that the server does before it decodes: add the messages, word by word."""
    total = messages[0].copy()
    for m in messages[1:]:
        total += m
    return total


def decode(total: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """The signed reading of a sum modulo 2^b, in units of the update, float64."""
    spare = 8 * total.itemsize - bits
    signed = (total << spare).view(np.dtype(f"<i{total.itemsize}")) >> spare
    return signed.astype(np.float64) / scale


def _doubles(rows: Tensor) -> np.ndarray:
    return rows.detach().cpu().double().numpy()
