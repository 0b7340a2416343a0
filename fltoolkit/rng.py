"""Named random streams: every random choice has a name, and no two names share numbers.

`stream(seed, "round", 3, "client", 7, "defense", "gaussian")` depends on its arguments alone, never on
what was drawn before. So a defense switched on moves no other stream, a repeat gives identical numbers,
and a resumed run gives what the uninterrupted run gives.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

Key = str | int


def _sequence(seed: int, key: tuple[Key, ...]) -> np.random.SeedSequence:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.SeedSequence([seed, *np.frombuffer(digest, np.uint32).tolist()])


def stream(seed: int, *key: Key) -> np.random.Generator:
    """NumPy generator of the stream named `key` under `seed` (an integer >= 0)."""
    return np.random.default_rng(_sequence(seed, key))


def torch_stream(seed: int, *key: Key) -> torch.Generator:
    """PyTorch CPU generator of the stream named `key`; draw on the CPU and move, so devices agree."""
    state = int(_sequence(seed, key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(state)
