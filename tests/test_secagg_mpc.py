"""Sums on secret shares: exact, whoever reached whom, and uniform views below the threshold."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fltoolkit.errors import InputError
from fltoolkit.secagg.errors import Inconsistent, Malformed, OutOfOrder, Replayed, TooFew
from fltoolkit.secagg.mpc import Server, Terms, client_messages, reconstruct, run
from fltoolkit.secagg.parties import bitmap
from fltoolkit.secagg.prime_field import PRIME, inverse, matmul, vandermonde
from fltoolkit.secagg.sharing import add_up, additive, interpolate, polynomial
from fltoolkit.secagg.wire import HEADER_BYTES, Wire
from fltoolkit.secagg.words import reduce, word

MEMBERS = (30, 31, 32, 33)


def terms(servers=3, threshold=None, least=1, dim=5, bits=32, members=MEMBERS):
    return Terms(Wire(bytes(16)), members, servers, threshold or servers, least, dim, bits)


def inputs(t, seed=0):
    rng = np.random.default_rng(seed)
    if t.is_additive:
        draw = lambda: reduce(rng.integers(0, 2**64, t.dim, np.uint64).astype(word(t.bits)), t.bits)  # noqa: E731
    else:
        draw = lambda: rng.integers(0, PRIME, t.dim, np.uint64).astype("<u4")  # noqa: E731
    return {c: draw() for c in t.members}


def modulus(t):
    return 2**t.bits if t.is_additive else PRIME


def expected(given_, clients, t, weights=None):
    w = weights or {}
    columns = zip(*([int(v) * w.get(c, 1) for v in given_[c]] for c in clients), strict=True)
    return [sum(column) % modulus(t) for column in columns]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_weighted_total_is_exact_over_those_whom_all_servers_heard(data):
    servers = data.draw(st.integers(2, 5))
    threshold = data.draw(st.integers(2, servers))
    bits = data.draw(st.integers(1, 64)) if threshold == servers else 32
    members = tuple(range(7, 7 + data.draw(st.integers(1, 6))))
    t = terms(servers, threshold, 1, data.draw(st.integers(1, 20)), bits, members)
    given_ = inputs(t, data.draw(st.integers(0, 99)))
    subsets = st.frozensets(st.integers(0, servers - 1))
    reached = data.draw(st.dictionaries(st.sampled_from(members), subsets))
    weights = data.draw(st.dictionaries(st.sampled_from(members), st.integers(0, 10**6)))
    up = sorted(data.draw(st.permutations(range(servers)))[:threshold])
    there = [c for c in members if len(reached.get(c, range(servers))) == servers]
    if not there:
        with pytest.raises(TooFew, match="clients in a total must be at least 1, got 0"):
            run(given_, t, reached, weights, up)
        return
    done = run(given_, t, reached, weights, up)
    assert done.survivors == tuple(there)
    assert done.total.tolist() == expected(given_, there, t, weights)


def test_all_but_one_client_send_seeds_to_all_but_one_server():
    t = terms(4, dim=1000)
    messages = client_messages(30, inputs(t)[30], t)
    assert [len(m) for m in messages] == [32 + 16] * 3 + [32 + 4000]


@pytest.mark.parametrize("servers", [2, 3])
def test_any_servers_but_one_see_the_same_whatever_the_input(servers):
    """Every mask modulo four, D = 1."""
    for holders in combinations(range(servers), servers - 1):
        views = []
        for x in range(4):
            seen = Counter()
            for masks in product(range(4), repeat=servers - 1):
                masks_ = np.array(masks, np.uint8)[:, None]
                shares = [*masks_, additive(np.array([x], np.uint8), masks_, 2)]
                assert add_up(shares, 2).tolist() == [x]
                seen[tuple(int(shares[h][0]) for h in holders)] += 1
            views.append(seen)
        assert all(v == views[0] for v in views)
        assert len(views[0]) == 4 ** (servers - 1)


@pytest.mark.parametrize(("servers", "t"), [(3, 2), (4, 3), (4, 2)])
def test_fewer_servers_than_the_threshold_see_the_same_whatever_the_input(servers, t):
    """Every polynomial over the field of five, D = 1."""
    points = range(1, servers + 1)
    for holders in combinations(range(servers), t - 1):
        views = []
        for x in range(5):
            seen = Counter()
            for noise in product(range(5), repeat=t - 1):
                shares = polynomial(np.array([x], np.uint64), np.array(noise, np.uint64)[:, None], points, 5)
                chosen = [0, *range(2, t + 1)][:t]
                assert interpolate(shares[chosen], [points[i] for i in chosen], 5).tolist() == [x]
                seen[tuple(shares[list(holders), 0].tolist())] += 1
            views.append(seen)
        assert all(v == views[0] for v in views)
        assert len(views[0]) == 5 ** (t - 1)


@pytest.mark.parametrize("threshold", [2, 3])
def test_a_share_of_full_size_is_uniform(threshold):
    t = terms(3, threshold, dim=40_000)
    words = np.full(t.dim, 7, "<u4")
    for message in client_messages(30, words, t)[-2:]:
        if len(message) > 100:
            counts = np.bincount(np.frombuffer(message[32:], np.uint8), minlength=256)
            assert chisquare(counts).pvalue > 1e-6


def test_a_client_draws_a_fresh_polynomial_of_full_degree():
    """Its coefficients, read back from the messages to four servers of whom three are needed."""
    t, points = terms(4, 3, dim=20_000), range(1, 5)
    drawn = []
    for client in MEMBERS:
        words = np.full(t.dim, 7, "<u4")
        messages = client_messages(client, words, t)
        shares = np.stack([t.share(t.wire.unpack(m, 0, client)) for m in messages])
        found = matmul(inverse(vandermonde(points, 4)), shares)
        assert found[0].tolist() == words.tolist()
        assert not found[3].any()
        for row in found[1:3]:
            assert chisquare(np.bincount((row // 2**24).astype(int), minlength=256)).pvalue > 1e-6
            drawn.append(row.tobytes())
    assert len(set(drawn)) == 8


def test_no_seed_is_sent_twice():
    t = terms(4)
    given_ = inputs(t)
    sent = [m for c in MEMBERS for _ in range(2) for m in client_messages(c, given_[c], t)[:-1]]
    assert len({m[HEADER_BYTES:] for m in sent}) == 4 * 2 * 3


def served(t):
    given_ = inputs(t)
    servers = [Server(i, t) for i in range(t.servers)]
    messages = {c: client_messages(c, w, t) for c, w in given_.items()}
    return servers, messages


def test_what_is_not_a_clients_share_is_refused_and_kept_out():
    t = terms()
    servers, messages = served(t)
    last, good = servers[-1], messages[30][-1]
    for bad, error in (
        (good[:-1], Malformed),
        (b"", Malformed),
        (good[:5] + b"\x01" + good[6:], OutOfOrder),
        (good[:6] + b"\x01" * 16 + good[22:], Replayed),
    ):
        with pytest.raises(error):
            last.receive(30, bad)
    with pytest.raises(OutOfOrder, match="sender 31, got 0 and 30"):
        last.receive(31, good)
    with pytest.raises(OutOfOrder, match="client 99 must be a member"):
        last.receive(99, good)
    with pytest.raises(Malformed, match="a seed must be 16 bytes"):
        servers[0].receive(30, messages[30][-1])
    last.receive(30, good)
    with pytest.raises(Replayed, match="client 30 must send one share to a server"):
        last.receive(30, good)
    prime = terms(3, 2)
    with pytest.raises(Malformed, match="words must be below"):
        Server(0, prime).receive(30, prime.wire.pack(0, 30, b"\xff" * 20))


def test_a_server_adds_up_one_set_of_clients():
    """Two sets that differ by a client would give that client's input away."""
    t = terms(least=2)
    servers, messages = served(t)
    for s in servers:
        for c in MEMBERS:
            s.receive(c, messages[c][s.index])
    first = servers[0]
    with pytest.raises(OutOfOrder, match="servers must agree on who is in the total first"):
        first.total()
    heard = {s.index: s.heard() for s in servers}
    for others in ({1: heard[1]}, heard, {1: heard[1], 2: heard[2], 3: heard[2]}):
        with pytest.raises(Inconsistent, match="servers that agree must be all 3, got"):
            first.agree(others)
    first.agree({1: heard[1], 2: heard[2]})
    first.total()
    late = Server(1, t)
    late.receive(30, messages[30][1])
    late.receive(31, messages[31][1])
    with pytest.raises(Inconsistent, match="a server must add up one set of clients"):
        first.agree({1: late.heard(), 2: heard[2]})
    with pytest.raises(OutOfOrder, match="shares must arrive before the servers agree"):
        _agreed(t).receive(30, messages[30][0])


@pytest.mark.parametrize("threshold", [2, 3])
def test_sums_over_different_clients_make_no_total(threshold):
    """As where a server tells one that it did not hear a client, and another that it did."""
    t = terms(3, threshold)
    servers, messages = served(t)
    for s in servers:
        for c in MEMBERS:
            s.receive(c, messages[c][s.index])
    heard = {s.index: s.heard() for s in servers}
    less = t.wire.pack(1, 2, bitmap(MEMBERS, MEMBERS[1:]))
    for s in servers:
        told = heard | {2: less} if s.index == 1 else heard
        s.agree({i: m for i, m in told.items() if i != s.index})
    totals = {s.index: s.total() for s in servers}
    with pytest.raises(Inconsistent, match="sums must be over the same clients"):
        reconstruct(totals, t)
    with pytest.raises(OutOfOrder, match=r"sums must be those of servers 0 to 2, got \[0, 1, 7\]"):
        reconstruct({0: totals[0], 1: totals[1], 7: totals[2]}, t)


def _agreed(t):
    server = Server(0, t)
    server._agreed = frozenset(MEMBERS)
    return server


def test_too_few_clients_or_servers_end_it():
    t = terms(3, 2, least=3)
    with pytest.raises(TooFew, match="clients in a total must be at least 3, got 2"):
        run(inputs(t), t, {30: [0], 31: []})
    with pytest.raises(TooFew, match="servers with a sum must be at least 2, got 1"):
        run(inputs(t), t, up=[1])
    with pytest.raises(TooFew):
        reconstruct({}, t)


def test_impossible_terms_are_refused():
    for change, message in (
        ({"servers": 1}, "servers must be >= 2, got 1"),
        ({"threshold": 1}, "threshold must be from 2 to 3, got 1"),
        ({"threshold": 4}, "threshold must be from 2 to 3, got 4"),
        ({"least": 5}, "least must be from 1 to 4 clients, got 5"),
        ({"dim": 0}, "dim must be >= 1, got 0"),
        ({"bits": 0}, "bits must be an integer from 1 to 64, got 0"),
        ({"threshold": 2, "bits": 16}, "bits must be 32 with a threshold, got 16"),
    ):
        with pytest.raises(InputError, match=message):
            terms(**change)
    with pytest.raises(InputError, match="members must be distinct"):
        terms(members=(30, 30, 31))
    for points in ([0, 1, 2], [1, 1, 2], [5, 1, 2]):
        with pytest.raises(InputError, match="points must be distinct and from 1 to 4, got"):
            polynomial(np.zeros(1, np.uint64), np.zeros((1, 1), np.uint64), points, 5)
