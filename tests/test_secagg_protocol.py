"""Bonawitz and SecAgg+ sessions: exact sums through dropouts, refusals by name, and what views tell."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from secagg_play import Rounds, Saboteur, changed

from fltoolkit.errors import InputError
from fltoolkit.secagg import bonawitz, graph, session, shamir
from fltoolkit.secagg.bonawitz_client import Client
from fltoolkit.secagg.bonawitz_server import Server
from fltoolkit.secagg.cost import expansion, modulus_bits, paper_bytes
from fltoolkit.secagg.errors import (
    Forged,
    Greedy,
    Inconsistent,
    Malformed,
    OutOfOrder,
    ProtocolError,
    Replayed,
    TooFew,
)
from fltoolkit.secagg.keys import KeyPair, Signer
from fltoolkit.secagg.parties import bitmap, members_in
from fltoolkit.secagg.wire import SERVER, Wire, pack_records, unpack_records
from fltoolkit.secagg.words import add_mask, pack, reduce, unpack, wire_size, word

SESSION = bytes(range(16))
MASKED = 2  # the round in which inputs are sent


class Play(Rounds):
    """A session whose parties can be looked at: inputs are random words, clients numbered 10, 11, ..."""

    def __init__(self, n, dim=5, bits=32, threshold=None, least=None, degree=None, signed=False, seed=0):
        rng = np.random.default_rng(seed)
        members = tuple(range(10, 10 + n))
        threshold = threshold or n // 2 + 1
        signers = {c: Signer() for c in members} if signed else {}
        wire = Wire(SESSION, {c: s.public for c, s in signers.items()} if signed else None)
        net = graph.harary(members, degree, rng) if degree else graph.complete(members)
        self.terms = bonawitz.Terms(wire, net, threshold, least or threshold, dim, bits)
        words = {c: reduce(rng.integers(0, 2**64, dim, np.uint64).astype(word(bits)), bits) for c in members}
        clients = {c: Client(c, words[c], self.terms, b"", signers.get(c)) for c in members}
        super().__init__(Server(self.terms), clients, words, 2**bits)


# --- exact sums -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_of_survivors_is_exact_whoever_drops_out_whenever(data):
    n = data.draw(st.integers(1, 9), "n")
    signed = data.draw(st.booleans(), "signed")
    low = 2 * n // 3 + 1 if signed else 1
    threshold = data.draw(st.integers(low, n), "t")
    bits, dim = data.draw(st.integers(1, 64), "bits"), data.draw(st.integers(1, 40), "dim")
    play = Play(n, dim, bits, threshold, signed=signed)
    names = play.terms.rounds
    silent = data.draw(st.dictionaries(st.sampled_from(sorted(play.clients)), st.integers(0, len(names) - 1)))
    there = [sum(silent.get(c, len(names)) > r for c in play.clients) for r in range(len(names))]
    if min(there) < threshold:
        with pytest.raises(TooFew):
            play.run(silent)
        return
    record = play.run(silent)
    survivors = tuple(c for c in play.clients if silent.get(c, len(names)) > MASKED)
    assert record.survivors == survivors
    assert record.total.tolist() == play.expected(survivors)
    assert record.refused == {}


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 16), st.integers(2, 3), st.integers(0, 10**6), st.integers(1, 64))
def test_a_sparse_graph_adds_exactly_too(n, half, seed, bits):
    play = Play(n, 7, bits, threshold=half, least=n // 2, degree=2 * half, seed=seed)
    rng = np.random.default_rng(seed)
    silent = {int(c): int(rng.integers(4)) for c in rng.choice(list(play.clients), half, replace=False)}
    survivors = tuple(c for c in play.clients if silent.get(c, 4) > MASKED)
    try:
        record = play.run(silent)
    except TooFew:
        left = {c: [v for v in play.terms.holders(c) if silent.get(v, 4) > 3] for c in survivors}
        short = [c for c in play.clients if len(play.terms.holders(c)) - half < half]
        assert short
        assert min(map(len, left.values())) < half or len(survivors) < n // 2 or short
        return
    assert record.survivors == survivors
    assert record.total.tolist() == play.expected(survivors)


@pytest.mark.parametrize("workers", [2, 3])
def test_threads_change_no_bit(workers):
    play = Play(7, 300_000, 31)
    play.server = Server(play.terms, workers=workers)
    record = play.run({12: 2, 14: 2}, workers)
    assert record.total.tolist() == play.expected([c for c in play.words if c not in (12, 14)])


def test_one_client_is_its_own_sum():
    play = Play(1)
    assert play.run().total.tolist() == play.expected([10])


def test_inputs_are_left_as_they_were():
    play = Play(4)
    before = {c: w.copy() for c, w in play.words.items()}
    play.run()
    assert all((play.words[c] == before[c]).all() for c in before)


def test_the_server_holds_one_vector_whatever_the_cohort():
    """Messages are folded into the sum as they come: no round keeps a second array of D words."""
    play = Play(6, 1000)
    play.until(3)
    arrays = [v for v in vars(play.server).values() if isinstance(v, np.ndarray)]
    assert [a.nbytes for a in arrays] == [4000]
    kept = [len(x) for name, x in vars(play.server).items() if isinstance(x, bytes)]
    assert max(kept, default=0) < 1000


# --- below the threshold --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
def test_below_the_threshold_it_ends_and_no_share_is_sent(number):
    play = Play(5, threshold=4)
    sent = []
    with pytest.raises(TooFew, match="must be at least 4, got 3"):
        play.run({11: number, 13: number}, watch=lambda r, c, m: sent.append(r))
    assert max(sent) == number
    for c in (10, 12, 14):
        assert play.clients[c]._round == number + 1
    if number < 3:  # no client was asked to unmask
        assert 3 not in sent


def test_a_set_of_survivors_that_is_too_small_is_refused_by_every_client():
    """A server that says that all but one client are gone, to get that one's input, gets nothing."""
    play = Play(6, threshold=4)
    play.until(3)
    for c, client in play.clients.items():
        alone = play.terms.wire.pack(3, SERVER, bitmap(play.terms.graph.members, {c, 10}))
        with pytest.raises(TooFew, match="surviving neighbours must be at least 4"):
            client.reply(alone)


def test_in_a_sparse_graph_all_survivors_are_counted_beside_the_neighbours():
    play = Play(12, threshold=2, least=9, degree=4)
    play.until(3)
    client = play.clients[10]
    some = {10, *play.terms.graph.neighbours(10)}
    with pytest.raises(TooFew, match="survivors must be at least 9 clients, got 5"):
        client.reply(play.terms.wire.pack(3, SERVER, bitmap(play.terms.graph.members, some)))


# --- refusals -------------------------------------------------------------------------------------------


def test_a_second_set_of_survivors_gets_no_second_share():
    play = Play(5, threshold=2)
    play.until(3)
    client = play.clients[10]
    pack_set = lambda s: play.terms.wire.pack(3, SERVER, bitmap(play.terms.graph.members, s))  # noqa: E731
    client.reply(pack_set({10, 11, 12}))
    for again in ({10, 11, 12}, {10, 11, 12, 13}):
        with pytest.raises(Greedy, match="client 10 must reveal one share of each peer, and once"):
            client.reply(pack_set(again))


def test_one_answer_never_holds_both_shares_of_a_peer():
    play = Play(5, dim=2)
    inbox = play.until(3)
    for c, client in play.clients.items():
        held = {v: client._held[v] for v in client._held}
        body = client.reply(inbox[c])[32:]
        assert len(body) == 5 * 36
        for i, v in enumerate(sorted(held)):
            assert body[36 * i + 4 : 36 * i + 36] == held[v][32:]  # all survive: the seed's share
            assert held[v][:32] not in body


def test_signing_clients_notice_sets_that_change_between_them():
    play = Play(6, threshold=5, signed=True)
    inbox = play.until(3)
    honest = frozenset(play.clients)
    other = play.terms.wire.pack(3, SERVER, bitmap(play.terms.graph.members, honest - {15}))
    for c in list(inbox)[:3]:
        play.clients[c].reply(inbox[c])
    said = {c: play.clients[c].reply(other) for c in list(inbox)[3:5]}
    assert len(said) == 2
    # the server cannot pass the others' signatures off as signatures of the full set
    forged = {c: (m[-64:],) for c, m in said.items()}
    play2 = pack_records(
        bonawitz.SIGNATURES, {10: (bytes(64),), 11: (bytes(64),), 12: (bytes(64),), **forged}
    )
    with pytest.raises(Forged, match="a message must carry its sender's signature"):
        play.clients[10].reply(play.terms.wire.pack(4, SERVER, play2))
    few = pack_records(bonawitz.SIGNATURES, forged)
    with pytest.raises(TooFew, match="survivors that signed the set of survivors must be at least 5, got 2"):
        play.clients[11].reply(play.terms.wire.pack(4, SERVER, few))


def test_a_signing_client_accepts_no_key_that_its_peer_did_not_sign():
    """The server's own keys in the place of a peer's, to read the shares that are meant for it."""
    play = Play(4, signed=True)
    inbox = play.until(1)
    body = bytearray(inbox[10])
    at = 32 + 4
    body[at : at + 32] = KeyPair().public
    with pytest.raises(Forged, match="a message must carry its sender's signature"):
        play.clients[10].reply(bytes(body))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("truncated", (Malformed, Forged)),
        ("longer", (Malformed, Forged)),
        ("empty", (Malformed,)),
        ("flipped", (Forged,)),
        ("other session", (Replayed,)),
        ("other round", (OutOfOrder,)),
        ("other sender", (OutOfOrder,)),
        ("magic", (Malformed,)),
    ],
)
def test_what_is_not_a_clients_message_costs_that_client_only(signed, number, how, error):
    """The others' sum comes out exact, with the client in it where its input had arrived."""
    play = Play(6, 9, 20, threshold=5, signed=signed)
    if how == "flipped" and not signed:
        pytest.skip("without signatures the channel vouches for its messages")
    number += signed and number == 3  # the unmasking
    play.clients[10] = Saboteur(play.clients[10], number, how)
    record = play.run()
    assert isinstance(record.refused[10], error)
    survivors = [c for c in play.clients if c != 10 or number > MASKED]
    assert record.survivors == tuple(survivors)
    assert record.total.tolist() == play.expected(survivors)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("truncated", Malformed),
        ("empty", Malformed),
        ("other session", Replayed),
        ("other round", OutOfOrder),
        ("other sender", OutOfOrder),
        ("magic", Malformed),
    ],
)
def test_a_client_refuses_what_is_not_the_servers_message_and_says_no_more(number, how, error):
    play = Play(5)
    inbox = play.until(number)
    with pytest.raises(error):
        play.clients[10].reply(changed(inbox[10], how))
    with pytest.raises(OutOfOrder, match="client 10 has refused a message and takes part no more"):
        play.clients[10].reply(inbox[10])


def test_messages_twice_or_from_strangers_are_refused_and_change_nothing():
    play = Play(4)
    inbox = play.until(MASKED)
    answers = {c: play.clients[c].reply(inbox[c]) for c in inbox}
    play.server.receive(10, answers[10])
    before = play.server._sum.copy()
    with pytest.raises(Replayed, match="client 10 must answer once in a round"):
        play.server.receive(10, answers[10])
    with pytest.raises(OutOfOrder, match="client 99 must be one that is asked"):
        play.server.receive(99, answers[11])
    with pytest.raises(OutOfOrder, match="sender 11, got 2 and 12"):
        play.server.receive(11, answers[12])
    assert (play.server._sum == before).all()
    for c in (11, 12, 13):
        play.server.receive(c, answers[c])
    assert play.server.close().keys() == play.clients.keys()


def test_a_share_that_was_tampered_with_is_not_held_and_the_sum_is_still_exact():
    play = Play(5, threshold=3)
    inbox = play.until(MASKED)
    body = bytearray(inbox[10])
    body[40] ^= 1
    inbox[10] = bytes(body)
    for c in inbox:
        play.server.receive(c, play.clients[c].reply(inbox[c]))
    assert len(play.clients[10]._held) == 4
    inbox = play.server.close()
    for c in inbox:
        play.server.receive(c, play.clients[c].reply(inbox[c]))
    play.server.close()
    assert play.server.total().tolist() == play.expected(play.clients)


def test_wrong_shares_give_an_error_and_no_wrong_sum():
    for gone in (None, 11):
        play = Play(5, threshold=3)
        inbox = play.until(MASKED)
        for c in inbox:
            if c != gone:
                play.server.receive(c, play.clients[c].reply(inbox[c]))
        inbox = play.server.close()
        for c in inbox:
            answer = bytearray(play.clients[c].reply(inbox[c]))
            if c == 10:
                answer[32 + 36 + 6] ^= 1  # its share of client 11's secret
            play.server.receive(c, bytes(answer))
        with pytest.raises(Forged, match="client 11"):
            play.server.close()


def test_a_client_who_was_sent_another_model_sends_no_input_and_the_others_add_up_to_nothing():
    """Keys are bound to the broadcast: shares do not verify, and the pairs' masks cannot be rebuilt."""
    play = Play(6, threshold=4)
    play.clients[10] = Client(10, play.words[10], play.terms, broadcast=b"crafted")
    sent = set()
    with pytest.raises(TooFew, match="shares of a secret of client 10 must be at least 4, got 0"):
        play.run(watch=lambda r, c, m: sent.add((r, c)))
    assert (MASKED, 11) in sent
    assert (MASKED, 10) not in sent
    with pytest.raises(OutOfOrder, match="client 10 has refused a message"):
        play.clients[10].reply(b"")


def test_masks_of_clients_who_were_sent_different_models_do_not_cancel():
    pair = [Client(c, np.zeros(8, "<u4"), Play(2).terms, told) for c, told in ((10, b"a"), (11, b"b"))]
    seeds = {
        a._mask.agree(b._mask.public, b"fltoolkit secagg pairwise mask v1", a._context(10, 11), 16)
        for a, b in (pair, pair[::-1])
    }
    assert len(seeds) == 2


@pytest.mark.parametrize("at", [0, 32])
def test_a_key_of_small_order_costs_its_owner_only(at):
    play = Play(5, threshold=3)
    bad = play.terms.wire.pack(0, 10, KeyPair().public * 2)

    class Bad:
        def reply(self, message):
            return bad[: 32 + at] + bytes(32) + bad[64 + at :]

    record = session.run(play.server, {**play.clients, 10: Bad()})
    assert isinstance(record.refused[10], Forged)
    assert record.total.tolist() == play.expected([11, 12, 13, 14])


def test_keys_that_repeat_or_come_from_no_neighbour_are_refused():
    play = Play(4)
    own = play.clients[11]
    play.until(1)
    pack_keys = lambda rows: play.terms.wire.pack(1, SERVER, pack_records(bonawitz.KEYS, rows))  # noqa: E731
    one, two, three = (KeyPair().public for _ in range(3))
    with pytest.raises(Inconsistent, match="keys must be different from each other"):
        play.clients[10].reply(pack_keys({11: (one, two), 12: (one, three), 13: (two, three)}))
    with pytest.raises(Inconsistent, match="keys must be those of neighbours"):
        own.reply(pack_keys({99: (one, two), 12: (three, one)}))
    with pytest.raises(TooFew, match="neighbours with keys must be at least 3, got 2"):
        play.clients[12].reply(pack_keys({11: (one, two)}))
    low = bytes(32)  # of small order: every secret agreed on is zero
    with pytest.raises(Forged, match="a public key must be a point of full order"):
        play.clients[13].reply(pack_keys({10: (low, one), 11: (two, three)}))


def test_survivors_whose_shares_never_came_are_refused():
    play = Play(5, threshold=2)
    inbox = play.until(1)
    for c in inbox:
        if c != 14:
            play.server.receive(c, play.clients[c].reply(inbox[c]))
    inbox = play.server.close()
    for c in inbox:
        play.server.receive(c, play.clients[c].reply(inbox[c]))
    play.server.close()
    for said in ({10, 11, 14}, {11, 12}):
        client = play.clients[10] if 14 in said else play.clients[13]
        with pytest.raises(Inconsistent, match="survivors must be clients whose shares were sent, oneself"):
            client.reply(play.terms.wire.pack(3, SERVER, bitmap(play.terms.graph.members, said)))


def test_impossible_terms_are_refused():
    with pytest.raises(InputError, match="threshold must be from 1 to 4 holders, got 5"):
        Play(4, threshold=5)
    with pytest.raises(InputError, match="least must be from 1 to 4 clients, got 9"):
        Play(4, least=9)
    with pytest.raises(InputError, match="bits must be an integer from 1 to 64, got 65"):
        Play(4, bits=65)
    with pytest.raises(InputError, match="a signed session must have the complete graph"):
        Play(8, threshold=3, degree=4, signed=True)
    with pytest.raises(InputError, match="threshold of a signed session must be above two thirds"):
        Play(6, threshold=4, signed=True)


# --- what views tell ------------------------------------------------------------------------------------


def test_a_masked_input_is_uniform():
    play = Play(3, 40_000)
    for w in play.words.values():
        w[:] = 7
    seen = {}
    play.run(watch=lambda r, c, m: seen.setdefault(c, m[32:]) if r == MASKED else None)
    for body in seen.values():
        assert chisquare(np.bincount(np.frombuffer(body, np.uint8), minlength=256)).pvalue > 1e-6


def enumerated(x, modulus, gone, colluding):
    """The view of the server, and of clients colluding with it, in a session of three with D = 1, over all
    masks: the masked inputs of all, since a late message may still arrive; what unmasking tells, that is own
    masks of survivors and pairs' masks of the gone; and what the colluding ones know, their inputs, own and
    pairs' masks."""
    views = Counter()
    for b0, b1, b2, s01, s02, s12 in product(range(modulus), repeat=6):
        own, pairs = (b0, b1, b2), {(0, 1): s01, (0, 2): s02, (1, 2): s12}
        sent = [
            (x[u] + own[u] + sum(s * ((u == a) - (u == b)) for (a, b), s in pairs.items())) % modulus
            for u in range(3)
        ]
        told = tuple(own[u] for u in range(3) if u not in gone or u in colluding)
        told += tuple(s for pair, s in pairs.items() if set(pair) & (gone | colluding))
        views[tuple(sent), told, tuple(x[u] for u in colluding)] += 1
    return views


@pytest.mark.parametrize("colluding", [set(), {1}])
@pytest.mark.parametrize("gone", [set(), {0}, {2}])
def test_a_view_depends_on_the_others_inputs_by_the_survivors_sum_alone(gone, colluding):
    """Replacing any client's input by another's leaves the view's distribution as it is."""
    modulus = 3
    by_sum = {}
    for x in product(range(modulus), repeat=3):
        total = sum(v for u, v in enumerate(x) if u not in gone | colluding) % modulus
        known = (total, *(x[u] for u in colluding))
        view = enumerated(x, modulus, gone, colluding)
        assert by_sum.setdefault(known, view) == view
    assert len({frozenset(v.items()) for v in by_sum.values()}) == modulus ** (1 + len(colluding))


def test_the_enumeration_is_that_of_the_code():
    """Masks given to the enumeration as the code derives them give the messages that the code sends."""
    play = Play(3, dim=1, bits=8)
    inbox = play.until(MASKED)
    sent = {c: play.clients[c].reply(inbox[c]) for c in inbox}
    zero = lambda: np.zeros(1, np.uint8)  # noqa: E731
    for u, client in play.clients.items():
        expected = play.words[u].astype(int)[0]
        mask = zero()
        add_mask(mask, client._seed[:16])
        expected += mask[0]
        for v, other in play.clients.items():
            if v != u:
                low, high = min(u, v), max(u, v)
                seed = client._mask.agree(
                    other._mask.public,
                    b"fltoolkit secagg pairwise mask v1",
                    SESSION + b"||%d|%d" % (low, high),
                    16,
                )
                mask = zero()
                add_mask(mask, seed)
                expected += int(mask[0]) * (1 if u < v else -1)
        assert sent[u][32:] == bytes([expected % 256])


@pytest.mark.parametrize(("n", "t"), [(3, 2), (3, 3), (4, 3)])
def test_fewer_shares_than_the_threshold_tell_nothing(n, t):
    """Every polynomial over the field of five: t - 1 shares have one distribution whatever the secret."""
    prime = 5
    views = []
    for secret in range(prime):
        seen = Counter()
        for coefficients in product(range(prime), repeat=t - 1):
            drawn = iter(coefficients)
            shares = shamir.share(secret, t, range(1, n + 1), prime, lambda _, d=drawn: next(d))
            assert shamir.combine(range(1, t + 1), shares[:t], prime) == secret
            assert shamir.combine(range(1, n + 1), shares, prime) == secret
            seen[tuple(shares[: t - 1])] += 1
        views.append(seen)
    assert all(v == views[0] for v in views)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.data())
def test_any_t_shares_of_full_size_fix_the_secret_and_fewer_do_not(n, data):
    t = data.draw(st.integers(1, n))
    secret = data.draw(st.integers(0, shamir.PRIME - 1))
    shares = shamir.share(secret, t, range(1, n + 1))
    chosen = data.draw(st.permutations(range(n)))[:t]
    assert shamir.combine([i + 1 for i in chosen], [shares[i] for i in chosen]) == secret
    if t > 1:
        fewer = chosen[: t - 1]
        assert shamir.combine([i + 1 for i in fewer], [shares[i] for i in fewer]) != secret


def test_the_field_is_one():
    """Fermat's test to 40 bases of the prime below 2^256."""
    assert all(pow(a, shamir.PRIME - 1, shamir.PRIME) == 1 for a in range(2, 42))


# --- bytes ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 50), st.integers(0, 2**32))
def test_packed_words_come_back_and_have_no_gaps(bits, dim, seed):
    rng = np.random.default_rng(seed)
    words = reduce(rng.integers(0, 2**64, dim, np.uint64).astype(word(bits)), bits)
    data = bytes(pack(words, bits))
    number = sum(int(w) << (bits * i) for i, w in enumerate(words.tolist()))
    assert data == number.to_bytes(wire_size(dim, bits), "little")
    assert (unpack(data, dim, bits) == words).all()
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(Malformed):
            unpack(wrong, dim, bits)


def test_records_come_in_ascending_order_each_once():
    """As they are written; another order, or one twice, could say two things of one client."""
    kind = bonawitz.SHARES
    rows = {c: (bytes([c]) * 32,) for c in (3, 5, 9)}
    data = pack_records(kind, rows)
    assert unpack_records(kind, data) == rows
    size = kind.itemsize
    for wrong in (data[size:] + data[:size], data[:size] * 2):
        with pytest.raises(Malformed, match="records must be in ascending order of clients, each once"):
            unpack_records(kind, wrong)
    with pytest.raises(Malformed, match="records must be multiples of 36 bytes, got 35"):
        unpack_records(kind, data[: size - 1])
    members = tuple(range(5))
    assert members_in(members, bitmap(members, {1, 4})) == {1, 4}
    with pytest.raises(Malformed, match="bits beyond the last client must be zero"):
        members_in(members, b"\xff")


def test_bits_beyond_the_last_value_are_refused():
    with pytest.raises(Malformed, match="the bits after 1 values of 7 bits must be zero"):
        unpack(b"\xff", 1, 7)


def test_the_papers_expansion_by_formula():
    """ePrint 2017/281: 1.73x for 2^10 users, 2^20 values of 16 bits; 1.98x for 2^14 users, 2^24 values."""
    assert expansion(2**10, 2**20, 16) == pytest.approx(1.73, abs=0.005)
    assert expansion(2**14, 2**24, 16) == pytest.approx(1.98, abs=0.005)


@pytest.mark.parametrize("n", [8, 20])
def test_bytes_counted_from_messages_are_near_the_papers_formula(n):
    """Ours add headers, tags, numbers and the commitment: at most 40 % over its overhead without the
    values."""
    value_bits, dim = 16, 512
    bits = modulus_bits(n, value_bits)
    play = Play(n, dim, bits)
    record = play.run()
    ours = max(sum(r.sent[c] + r.received[c] for r in record.rounds) for c in play.clients)
    values = wire_size(dim, bits)
    paper = paper_bytes(n, dim, value_bits) - dim * bits / 8
    assert 1.0 < (ours - values) / paper < 1.4


def test_the_mask_is_aes_ctr_over_chunks():
    """The keystream of the zero key begins with AES-128 of the zero block (a known value); a long mask is one
    stream, whatever the chunks."""
    short = np.zeros(4, "<u4")
    add_mask(short, bytes(16))
    assert short.tobytes().hex() == "66e94bd4ef8a2c3b884cfa59ca342b2e"
    long = np.zeros(300_001, "<u2")
    add_mask(long, bytes(16))
    assert long[:8].tobytes() == short.tobytes()
    blocks = long.tobytes()[: 300_001 * 2 // 16 * 16]
    assert len({blocks[i : i + 16] for i in range(0, len(blocks), 16)}) == len(blocks) // 16
    add_mask(long, bytes(16), subtract=True)
    assert not long.any()


def test_every_refusal_is_a_protocol_error():
    for kind in (Forged, Greedy, Inconsistent, Malformed, OutOfOrder, Replayed, TooFew):
        assert issubclass(kind, ProtocolError)
