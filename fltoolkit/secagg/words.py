"""Vectors of integers modulo 2^b as unsigned machine words, their masks, and their bytes on the wire."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fltoolkit.secagg.errors import Malformed

SEED_BYTES = 16
"""Length of the seed of a mask: the key of AES-128."""

CHUNK = 1 << 18
"""Bytes of keystream made at a time, so that it is added while it is in the cache."""

_ZEROS = bytes(CHUNK)
_scratch = threading.local()


def word(bits: int) -> np.dtype:
    """The smallest unsigned little-endian word that holds b bits. 2^b divides its modulus, so adding
    words and reducing at the end is adding modulo 2^b."""
    return np.min_scalar_type(2**bits - 1).newbyteorder("<")


def reduce(words: np.ndarray, bits: int) -> np.ndarray:
    """Words modulo 2^b, in place."""
    if bits < 8 * words.itemsize:
        words &= words.dtype.type(2**bits - 1)
    return words


def add_mask(words: np.ndarray, seed: bytes, subtract: bool = False) -> None:
    """Add to `words [D]`, in place, or subtract, the mask of a seed: uniform words, the AES-128-CTR keystream
    under the seed. A seed serves one mask only, so that its counter may start at zero. A uniform word is
    also uniform modulo 2^b."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    if not hasattr(_scratch, "buffer"):
        _scratch.buffer = bytearray(CHUNK + 15)
    buffer = _scratch.buffer
    step = CHUNK // words.itemsize
    mask = np.frombuffer(buffer, words.dtype, count=step)
    apply = np.subtract if subtract else np.add
    for a in range(0, len(words), step):
        part = words[a : a + step]
        stream.update_into(_ZEROS if len(part) == step else bytes(part.nbytes), buffer)
        apply(part, mask[: len(part)], out=part)


def wire_size(dim: int, bits: int) -> int:
    """Bytes of D values of b bits each, packed without gaps."""
    return -(-dim * bits // 8)


def pack(words: np.ndarray, bits: int) -> bytes | memoryview:
    """Reduced words `[D]` -> ⌈D b / 8⌉ bytes, least significant bit first; a view where words are full."""
    if bits == 8 * words.itemsize:
        return words.data.cast("B")
    dim, wide = len(words), np.zeros(-(-len(words) // 8) * 8, "<u8")
    wide[:dim] = words
    out = np.zeros((len(wide) // 8, bits), np.uint8)
    for j, shift, column in _pieces(bits):
        value = wide[j::8] >> np.uint64(shift) if shift >= 0 else wide[j::8] << np.uint64(-shift)
        out[:, column] |= (value & np.uint64(0xFF)).astype(np.uint8)
    return out.tobytes()[: wire_size(dim, bits)]


def unpack(data: bytes | memoryview, dim: int, bits: int) -> np.ndarray:
    """The words `[D]` of `pack`, a view where they are full. Raises Malformed where the length, or a bit
    beyond the last value, is wrong."""
    if len(data) != wire_size(dim, bits):
        raise Malformed(f"{dim} values of {bits} bits must be {wire_size(dim, bits)} bytes, got {len(data)}")
    kind = word(bits)
    if bits == 8 * kind.itemsize:
        return np.frombuffer(data, kind)
    raw = np.zeros((-(-dim // 8), bits), np.uint8)
    raw.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    wide = np.zeros(8 * len(raw), "<u8")
    for j, shift, column in _pieces(bits):
        value = raw[:, column].astype("<u8")
        wide[j::8] |= value << np.uint64(shift) if shift >= 0 else value >> np.uint64(-shift)
    wide &= np.uint64(2**bits - 1)
    if wide[dim:].any():
        raise Malformed(f"the bits after {dim} values of {bits} bits must be zero")
    return wide[:dim].astype(kind)


def _pieces(bits: int) -> Iterator[tuple[int, int, int]]:
    """Eight values of b bits fill b bytes: (value, by how much it is shifted down, byte) of each overlap."""
    for j in range(8):
        for column in range(j * bits // 8, -(-(j + 1) * bits // 8)):
            yield j, 8 * column - j * bits, column
