"""Partitions: every example dealt once, sizes and classes as their sources say."""

from __future__ import annotations

import numpy as np
import pytest

from fltoolkit.data.partition import PARTITIONS, partition
from fltoolkit.errors import InputError

Y = np.repeat(np.arange(10), 60)
IDS = np.random.default_rng(9).permutation(np.repeat(np.arange(30), 20))


def deal(spec, clients, seed=0, y=Y, ids=IDS):
    return partition(spec, y, clients, np.random.default_rng(seed), ids)


@pytest.mark.parametrize(
    "name", ["iid", "shards", "dirichlet:alpha=0.1", "unbalanced:sigma=2", "shards:per_client=1"]
)
@pytest.mark.parametrize("clients", [1, 7, 100, 300])
def test_each_example_is_dealt_once(name, clients):
    parts = deal(name, clients)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    sizes = [len(p) for p in parts]
    assert min(sizes) >= 1
    if "unbalanced" not in name:
        assert max(sizes) - min(sizes) <= (2 if name == "shards" else 1)


def test_shards_hold_two_classes_where_iid_holds_many():
    by_shards = [len(set(Y[p])) for p in deal("shards", 10)]
    by_iid = [len(set(Y[p])) for p in deal("iid", 10)]
    assert max(by_shards) <= 2 * 2
    assert np.mean(by_shards) < 2.5
    assert min(by_iid) >= 9
    assert max(len(set(Y[p])) for p in deal("shards:per_client=1", 10)) == 1


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_closed_forms_second_moment(alpha):
    """E Σ q_c² = (α Σ p_c² + 1) / (α + 1) for q ~ Dir(α p). The first 300 of 3,000 clients, before any class
    is used up, with the unbiased estimate Σ n_c (n_c − 1) / (n (n − 1))."""
    y = np.random.default_rng(1).choice(4, 60_000, p=[0.1, 0.2, 0.3, 0.4])
    p = np.bincount(y) / len(y)
    counts = np.array(
        [np.bincount(y[part], minlength=4) for part in deal(f"dirichlet:alpha={alpha}", 3000, y=y)[:300]]
    )
    n = counts.sum(1)
    found = (counts * (counts - 1)).sum(1) / (n * (n - 1))
    expected = (alpha * (p**2).sum() + 1) / (alpha + 1)
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(found))


def test_unbalanced_sizes_are_lognormal():
    sizes = np.array([len(p) for p in deal("unbalanced:sigma=0.7", 1000, y=np.zeros(10**6, int), ids=None)])
    assert np.log(sizes).std() == pytest.approx(0.7, abs=0.06)
    even = [len(p) for p in deal("unbalanced:sigma=0", 100)]
    assert set(even) == {6}


def test_natural_clients_are_those_of_the_data():
    parts = deal("natural", None)
    assert [set(IDS[p]) for p in parts] == [{k} for k in range(30)]
    some = deal("natural", 7)
    chosen = [set(IDS[p]) for p in some]
    assert len(set(map(frozenset, chosen))) == 7
    assert all(len(c) == 1 for c in chosen)
    assert sum(map(len, some)) == 140


def test_number_of_clients_defaults_to_the_natural_one_else_100():
    assert len(deal("iid", None)) == 30
    assert len(deal("iid", None, ids=None)) == 100


@pytest.mark.parametrize("name", PARTITIONS)
def test_deals_follow_their_generator(name):
    clients = 12 if name == "natural" else 10
    first, same, other = (np.concatenate(deal(name, clients, s)).tolist() for s in (1, 1, 2))
    assert first == same
    assert first != other


def test_tokens_are_dealt_where_classes_do_not_matter():
    y = np.zeros((600, 5), int)
    assert len(deal("iid", 10, y=y)) == len(deal("unbalanced", 10, y=y)) == 10
    for name in ("shards", "dirichlet"):
        with pytest.raises(InputError, match=rf"{name!r} needs one label an example, got .* \(600, 5\)"):
            deal(name, 10, y=y)


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ("iid", 601, "got 601 parts of 600 examples"),
        ("shards", 301, "got 602 parts of 600 examples"),
        ("iid", 0, "clients must be >= 1, got 0"),
        ("idd", 5, r"unknown partition 'idd'; did you mean 'iid'"),
        ("dirichlet:alpha=0", 5, "alpha must be a finite number > 0, got 0"),
        ("dirichlet:beta=1", 5, "unknown option of partition dirichlet 'beta'"),
        ("unbalanced:sigma=-1", 5, "sigma must be between 0 and 100"),
        ("unbalanced:sigma=1000", 5, "sigma must be between 0 and 100"),
        ("shards:per_client=0", 5, "per_client must be >= 1"),
        ("natural", 31, "clients must be from 1 to the 30 there are, got 31"),
    ],
)
def test_impossible_deals_are_refused(spec, clients, message):
    with pytest.raises(InputError, match=message):
        deal(spec, clients)


def test_natural_needs_data_that_knows_its_clients():
    with pytest.raises(InputError, match="needs data that knows its clients"):
        deal("natural", 5, ids=None)
