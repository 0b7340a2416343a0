"""Updates as integers whose weighted sum cannot overflow.

Client k encodes its update Δ_k as round(n_k / W · s · Δ_k) modulo M, with n_k behind it as a value of its
own, so that neither is ever sent in plain text; the sum of the cohort's words decodes to Σ n_k Δ_k and Σ
n_k. The integers per unit, s, are a power of two, so that integers times a power of two γ ≥ 1 / s are
encoded exactly where all n_k are W (see `fltoolkit.integer_domain`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, isfinite, log2

import numpy as np

from fltoolkit.errors import require
from fltoolkit.secagg.words import reduce, word


@dataclass(frozen=True)
class FixedPoint:
    """The public encoding of a cohort.

    clients: K, the most that a sum may hold. modulus: M, from 2^16 to 2^64. value_range: bound on the
    absolute value of an update's coordinates; a larger one is refused, never clipped. most: W, the largest
    weight n_k. Raises InputError where M is too small for K clients or for their weights.
    """

    clients: int
    modulus: int = 2**32
    value_range: float = 8.0
    most: int = 1

    def __post_init__(self) -> None:
        require(2**16 <= self.modulus <= 2**64, "bits", "an integer from 16 to 64", log2(self.modulus))
        good = isfinite(self.value_range) and self.value_range >= 1e-30
        require(good, "range", "a finite number >= 1e-30", self.value_range)
        require(self._room > 0, "bits", f"large enough to add up {self.clients} clients", log2(self.modulus))
        enough = self.clients * self.most < self.modulus
        what = f"large enough for {self.clients} weights of up to {self.most}"
        require(enough, "bits", what, log2(self.modulus))

    @property
    def _room(self) -> int:
        return (self.modulus - 1) // 2 - self.clients

    @property
    def scale(self) -> float:
        """s, integers per unit. Rounding moves each of K terms by less than 1, so the sum stays within
        K (range · s + 1) < M / 2: it cannot wrap. The factor below 1 covers float64's own rounding."""
        return 2.0 ** floor(log2(self._room * (1 - 2**-40) / (self.value_range * self.clients)))

    def encode(self, row: np.ndarray, weight: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """A client's `row [D]` (float64) and weight n_k -> words `[D + 1]`.

        Rounds to the nearest integer, or with a generator up or down at random and without bias. Raises
        InputError where a value is outside of the range or not finite, or the weight not from 1 to W.
        """
        require(1 <= weight <= self.most, "weight", f"from 1 to {self.most}", weight)
        largest = float(np.abs(row).max(initial=0))
        require(isfinite(largest), "update", "finite", largest)
        require(largest <= self.value_range, "range", f"at least {largest}", self.value_range)
        values = row * (weight / self.most * self.scale)
        rounded = np.rint(values) if rng is None else np.floor(values + rng.random(len(values)))
        integers = np.append(rounded.astype(np.int64), weight)
        words = integers.astype(word(self._bits))
        if self._is_power_of_two:
            return reduce(words, self._bits)
        return np.mod(integers, self.modulus).astype(words.dtype)

    def decode(self, total: np.ndarray) -> tuple[np.ndarray, int]:
        """A sum of words `[D + 1]` modulo M -> Σ n_k / W Δ_k `[D]`, float64, and Σ n_k."""
        if self._is_power_of_two:
            spare = 8 * total.itemsize - self._bits
            signed = (total[:-1] << spare).view(np.dtype(f"<i{total.itemsize}")) >> spare
        else:
            signed = total[:-1].astype(np.int64)
            signed[signed > self.modulus // 2] -= self.modulus
        return signed.astype(np.float64) / self.scale, int(total[-1])

    @property
    def _bits(self) -> int:
        return (self.modulus - 1).bit_length()

    @property
    def _is_power_of_two(self) -> bool:
        return self.modulus.bit_count() == 1

    def mean(self, total: np.ndarray) -> np.ndarray:
        """The weighted mean Σ n_k Δ_k / Σ n_k `[D]`, float64. It is within W n / (2 s Σ n_k) of the real one
        for n clients and nearest rounding, within twice that for random rounding."""
        values, weight = self.decode(total)
        return values * (self.most / weight)
