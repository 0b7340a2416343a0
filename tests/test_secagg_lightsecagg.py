"""LightSecAgg sessions: exact sums through dropouts, refusals by name, uniform messages."""

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
from fltoolkit.secagg import lightsecagg, session
from fltoolkit.secagg.coded_mask import decode, encode
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
from fltoolkit.secagg.keys import KeyPair
from fltoolkit.secagg.lightsecagg import KEYS, ROUNDS, Client, Server, Terms
from fltoolkit.secagg.parties import bitmap
from fltoolkit.secagg.prime_field import PRIME
from fltoolkit.secagg.wire import HEADER_BYTES, SERVER, Wire, pack_records

MASKED = 2


class Play(Rounds):
    def __init__(self, n, needed=None, private=None, dim=5, seed=0):
        members = tuple(range(20, 20 + n))
        needed = needed or n // 2 + 1
        private = min(needed - 1, n // 3) if private is None else private
        self.terms = Terms(Wire(bytes(range(16))), members, needed, private, dim)
        rng = np.random.default_rng(seed)
        words = {c: rng.integers(0, PRIME, dim, dtype=np.uint64) for c in members}
        clients = {c: Client(c, words[c], self.terms) for c in members}
        super().__init__(Server(self.terms), clients, words, PRIME)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_of_survivors_is_exact_whoever_drops_out_whenever(data):
    n = data.draw(st.integers(1, 8))
    needed = data.draw(st.integers(1, n))
    private = data.draw(st.integers(0, needed - 1))
    play = Play(n, needed, private, data.draw(st.integers(1, 30)), data.draw(st.integers(0, 99)))
    silent = data.draw(st.dictionaries(st.sampled_from(sorted(play.clients)), st.integers(0, 3)))
    there = [sum(silent.get(c, 4) > r for c in play.clients) for r in range(4)]
    if min(there) < needed:
        with pytest.raises(TooFew):
            play.run(silent)
        return
    record = play.run(silent)
    survivors = tuple(c for c in play.clients if silent.get(c, 4) > MASKED)
    assert record.survivors == survivors
    assert record.total.tolist() == play.expected(survivors)
    assert record.refused == {}
    assert [r.name for r in record.rounds] == list(ROUNDS)


@pytest.mark.parametrize("number", range(4))
def test_below_the_number_needed_it_ends_and_no_share_is_summed(number):
    play = Play(5, needed=4, private=1)
    sent = []
    with pytest.raises(TooFew, match="must be at least 4, got 3"):
        play.run({21: number, 23: number}, watch=lambda r, c, m: sent.append(r))
    assert max(sent) == number


def test_a_masked_input_is_uniform():
    play = Play(3, dim=40_000)
    for w in play.words.values():
        w[:] = 7
    seen = {}
    play.run(watch=lambda r, c, m: seen.setdefault(c, m[32:]) if r == MASKED else None)
    for body in seen.values():
        assert chisquare(np.bincount(np.frombuffer(body, np.uint8), minlength=256)).pvalue > 1e-6


def test_the_server_and_t_clients_see_nothing_but_the_honest_sum():
    """Every mask and noise of two honest clients over the field of five, for every pair of inputs; N = 3,
    U = 2, T = 1, D = 1. Columns are coded independently, so that all draws are coded at once."""
    prime, draws = 5, np.array(list(product(range(5), repeat=4)), np.uint64).T
    masks, noises = draws[:2], draws[2:]
    a, b = (encode(m, n[None], (1, 2, 3), 2, prime) for m, n in zip(masks, noises, strict=True))
    sums = (a + b) % prime
    assert (decode(sums[1:], (2, 3), draws.shape[1], 1, prime) == masks.sum(0) % prime).all()
    views = {}
    for x, y in product(range(prime), repeat=2):
        rows = [(x + masks[0]) % prime, (y + masks[1]) % prime, a[2], b[2], *sums]
        seen = Counter(map(tuple, np.stack(rows).T.tolist()))
        assert views.setdefault((x + y) % prime, seen) == seen
    assert len({frozenset(v.items()) for v in views.values()}) == prime


def test_a_client_codes_its_mask_with_fresh_noise_at_points_that_are_not_zero(monkeypatch):
    """What the enumerated code is given in a session, which no sum would show."""
    given_ = []

    def watched(mask, noise, points, needed):
        given_.append((mask, noise, tuple(points), needed))
        return encode(mask, noise, points, needed)

    monkeypatch.setattr(lightsecagg, "encode", watched)
    play = Play(5, needed=4, private=2, dim=20_000)
    play.until(MASKED)
    for mask, noise, points, needed in given_:
        assert (mask.shape, noise.shape) == ((20_000,), (2, 10_000))
        assert (points, needed) == ((1, 2, 3, 4, 5), 4)
        for words in (mask, *noise):
            counts = np.bincount((words // 2**24).astype(int), minlength=256)
            assert chisquare(counts).pvalue > 1e-6
    drawn = [row.tobytes() for mask, noise, _, _ in given_ for row in (mask, *noise)]
    assert len(set(drawn)) == 15


def test_no_two_parties_are_told_the_same_share_and_none_in_the_clear():
    play = Play(4, needed=3, private=1, dim=200)
    inbox = play.until(MASKED)
    for c, message in inbox.items():
        play.clients[c].reply(message)
    held = {(c, v): s for c, client in play.clients.items() for v, s in client._held.items()}
    assert len({s.tobytes() for s in held.values()}) == 16
    for share in held.values():
        assert not any(share.astype("<u4").tobytes() in message for message in inbox.values())


def test_a_client_answers_for_one_set_of_survivors_that_is_large_enough():
    play = Play(5, needed=3, private=1)
    play.until(3)
    told = lambda s: play.terms.wire.pack(3, SERVER, bitmap(play.terms.members, s))  # noqa: E731
    with pytest.raises(TooFew, match="survivors must be at least 3, got 2"):
        play.clients[20].reply(told({20, 21}))
    with pytest.raises(Inconsistent, match="survivors must be clients whose shares are held, oneself among"):
        play.clients[21].reply(told({20, 22, 23}))
    play.clients[22].reply(told({20, 21, 22}))
    with pytest.raises(Greedy):
        play.clients[22].reply(told({20, 21, 22, 23}))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("truncated", Malformed),
        ("empty", Malformed),
        ("other session", Replayed),
        ("other round", OutOfOrder),
    ],
)
def test_what_is_not_a_clients_message_costs_that_client_only(number, how, error):
    play = Play(6, needed=4, private=2)
    play.clients[20] = Saboteur(play.clients[20], number, how)
    record = play.run()
    assert isinstance(record.refused[20], error)
    survivors = [c for c in play.clients if c != 20 or number > MASKED]
    assert record.total.tolist() == play.expected(survivors)


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_that_fits_no_other_costs_its_owner_only(key):
    """Points of low order, with which peers could not agree on a key and would step back."""
    play = Play(6, needed=4, private=2)

    class Bad:
        def reply(self, message, inner=play.clients[20]):
            return inner.reply(message)[:HEADER_BYTES] + key

    record = session.run(play.server, {**play.clients, 20: Bad()})
    assert isinstance(record.refused[20], Forged)
    assert record.total.tolist() == play.expected(range(21, 26))


@pytest.mark.parametrize("rows", [range(22, 26), (20, *range(22, 26)), range(21, 27)])
def test_shares_for_others_than_all_peers_cost_their_sender_only(rows):
    play = Play(6, needed=4, private=2)

    class Bad:
        def reply(self, message, inner=play.clients[20]):
            answer = inner.reply(message)
            if inner._round != 2:
                return answer
            sealed = (bytes(play.terms.sealed["sealed"].itemsize),)
            return answer[:HEADER_BYTES] + pack_records(play.terms.sealed, dict.fromkeys(rows, sealed))

    record = session.run(play.server, {**play.clients, 20: Bad()})
    assert isinstance(record.refused[20], Malformed)
    assert record.total.tolist() == play.expected(range(21, 26))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_arrives_is_refused_by_name_and_leaves_no_trace(data):
    """Any body behind a good header: it is taken, or its receiver raises a ProtocolError and nothing else,
    keeps nothing of it, and a client that has refused says no more."""
    play = Play(4, needed=3, private=1)
    number = data.draw(st.integers(0, 3))
    message = play.until(number)[20]
    answer = bytes(play.clients[20].reply(message))
    body = data.draw(st.binary(max_size=300))
    try:
        play.server.receive(20, answer[:HEADER_BYTES] + body)
    except ProtocolError:
        assert 20 not in play.server._answered
        play.server.receive(20, answer)
    assert play.server._answered == {20}
    client = play.clients[21]
    try:
        client.reply(message[:HEADER_BYTES] + body)
    except ProtocolError:
        with pytest.raises(OutOfOrder, match="client 21 has refused a message"):
            client.reply(message)
    else:
        assert client._round == number + 1


def test_shares_of_strangers_are_refused():
    play = Play(4, needed=3, private=1)
    play.until(MASKED)
    sealed = (bytes(play.terms.sealed["sealed"].itemsize),)
    with pytest.raises(Inconsistent, match="shares must be those of peers whose keys are known"):
        play.clients[20].reply(
            play.terms.wire.pack(MASKED, SERVER, pack_records(play.terms.sealed, {99: sealed}))
        )


@pytest.mark.parametrize("number", [MASKED, 3])
def test_words_at_or_above_the_prime_are_refused(number):
    play = Play(6, needed=4, private=2)
    inbox = play.until(number)
    answer = play.clients[20].reply(inbox[20])
    with pytest.raises(Malformed, match="words must be below 4294967291"):
        play.server.receive(20, changed(answer, "ones"))


def test_a_share_that_was_tampered_with_is_not_held_and_its_holder_steps_back():
    play = Play(5, needed=3, private=1)
    inbox = play.until(MASKED)
    body = bytearray(inbox[20])
    body[40] ^= 1
    inbox[20] = bytes(body)
    for c in inbox:
        play.server.receive(c, play.clients[c].reply(inbox[c]))
    inbox = play.server.close()
    with pytest.raises(Inconsistent):
        play.clients[20].reply(inbox[20])
    for c in list(inbox)[1:]:
        play.server.receive(c, play.clients[c].reply(inbox[c]))
    play.server.close()
    assert play.server.total().tolist() == play.expected(play.clients)


def test_a_wrong_sum_of_shares_gives_an_error_where_more_answer_than_are_needed():
    play = Play(5, needed=3, private=1)
    inbox = play.until(3)
    for c in inbox:
        answer = bytearray(play.clients[c].reply(inbox[c]))
        if c == 20:
            answer[33] ^= 1
        play.server.receive(c, bytes(answer))
    with pytest.raises(Forged, match="sums of shares must be of the same masks"):
        play.server.close()


def test_a_client_who_was_sent_another_model_sends_no_input():
    play = Play(5, needed=3, private=1)
    play.clients[20] = Client(20, play.words[20], play.terms, b"crafted")
    record = play.run()
    assert isinstance(record.refused[20], TooFew)
    assert "clients with shares that verify must be at least 3, got 1" in str(record.refused[20])
    assert 20 not in record.rounds[MASKED].sent
    assert record.survivors == (21, 22, 23, 24)
    assert record.total.tolist() == play.expected(record.survivors)


def test_keys_of_strangers_and_too_few_keys_are_refused():
    play = Play(4, needed=3, private=1)
    play.until(1)
    told = lambda rows: play.terms.wire.pack(1, SERVER, pack_records(KEYS, rows))  # noqa: E731
    key = (KeyPair().public,)
    with pytest.raises(Inconsistent, match="keys must be those of other members"):
        play.clients[20].reply(told({21: key, 99: key}))
    with pytest.raises(TooFew, match="clients with keys must be at least 3, got 2"):
        play.clients[21].reply(told({20: key}))


def test_impossible_terms_are_refused():
    with pytest.raises(InputError, match="needed must be from 1 to 4 clients, got 5"):
        Play(4, needed=5)
    with pytest.raises(InputError, match="private must be from 0 to 2, got 3"):
        Play(4, needed=3, private=3)
    with pytest.raises(InputError, match="dim must be >= 1, got 0"):
        Play(4, dim=0)
    with pytest.raises(InputError, match="members must be distinct"):
        Terms(Wire(bytes(16)), (20, 20, 21), 2, 1, 5)
