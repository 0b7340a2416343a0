"""Partitions: every example dealt once, sizes and classes as the paper says."""

from __future__ import annotations

import numpy as np
import pytest

from fltoolkit.data.partition import iid, partition, shards
from fltoolkit.errors import InputError

Y = np.repeat(np.arange(10), 60)


@pytest.mark.parametrize("name", ["iid", "shards"])
@pytest.mark.parametrize("clients", [1, 7, 100, 300])
def test_each_example_is_dealt_once(name, clients):
    parts = partition(name, Y, clients, np.random.default_rng(0))
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= (1 if name == "iid" else 2)


def test_shards_hold_two_classes_where_iid_holds_many():
    rng = np.random.default_rng(0)
    by_shards = [len(set(Y[p])) for p in shards(Y, 10, rng)]
    by_iid = [len(set(Y[p])) for p in iid(Y, 10, rng)]
    assert max(by_shards) <= 2 * 2
    assert np.mean(by_shards) < 2.5
    assert min(by_iid) >= 9


def test_deals_follow_their_generator():
    first, same, other = (np.concatenate(iid(Y, 10, np.random.default_rng(s))).tolist() for s in (1, 1, 2))
    assert first == same
    assert first != other


def test_impossible_deals_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="got 601 parts of 600 examples"):
        iid(Y, 601, rng)
    with pytest.raises(InputError, match="got 602 parts of 600 examples"):
        shards(Y, 301, rng)
    with pytest.raises(InputError, match="clients must be >= 1, got 0"):
        iid(Y, 0, rng)
    with pytest.raises(InputError, match=r"unknown partition 'idd'; did you mean 'iid'"):
        partition("idd", Y, 5, rng)
