"""Secure aggregation as a defense: encoding, weights inside of the masks, dropouts in rounds, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import protect, tiny_examples, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from defenses.clip import Clip
from defenses.discrete_gaussian import DiscreteGaussian
from defenses.gaussian import Gaussian
from defenses.lightsecagg import LightSecAgg
from defenses.mpc import MPC
from defenses.secagg import SecAgg
from defenses.skellam import Skellam
from fltoolkit.defense import DefenseStack, Local, RoundContext, Sampling
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.secagg.fixed_point import FixedPoint
from fltoolkit.secagg.graph import parameters
from fltoolkit.training.federation import Federation
from fltoolkit.training.round import run_round
from fltoolkit.training.task import Task
from fltoolkit.types import Layout, LocalSpec, Meddling

Q = 2**32 - 5


def context(counts, number=1, **changes):
    w = torch.tensor(counts, dtype=torch.float64)
    clients = tuple(range(10, 10 + len(w)))
    return RoundContext(0, number, clients, w / w.sum(), name="secagg", counts=tuple(counts), **changes)


def rows(k, d, scale=1.0, seed=0):
    return scale * torch.randn(k, d, generator=torch.Generator().manual_seed(seed))


# --- encoding -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2**16, 2**17, 2**31, 2**32, 2**48, 2**64, Q]), st.integers(1, 9), st.data())
def test_encoded_sums_decode_to_python_integers_sums(modulus, n, data):
    most = data.draw(st.integers(1, 600))
    fixed = FixedPoint(n, modulus, 8.0, most)
    counts = [data.draw(st.integers(1, most)) for _ in range(n)]
    values = np.random.default_rng(data.draw(st.integers(0, 99))).uniform(-8, 8, (n, 5))
    words = [fixed.encode(v, c) for v, c in zip(values, counts, strict=True)]
    total = [sum(int(w) for w in column) % modulus for column in zip(*words, strict=True)]
    exact = [
        sum(round(v * (c / most * fixed.scale)) for v, c in zip(column, counts, strict=True))
        for column in values.T.tolist()
    ]
    signed = [t - modulus if t > modulus // 2 else t for t in total[:-1]]
    assert signed == exact
    found, weight = fixed.decode(np.array(total, words[0].dtype))
    assert weight == sum(counts)
    assert found.tolist() == [e / fixed.scale for e in exact]


@pytest.mark.parametrize("modulus", [2**16, 2**32, 2**50, 2**64, Q])
@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_the_largest_values_of_a_full_cohort_do_not_wrap(modulus, rng):
    fixed = FixedPoint(7, modulus, 8.0, 3)
    words = [fixed.encode(np.array([8.0, -8.0]), 3, rng) for _ in range(7)]
    total = np.array([sum(int(w[i]) for w in words) % modulus for i in range(3)], words[0].dtype)
    assert fixed.mean(total).tolist() == pytest.approx([8.0, -8.0], abs=7 / fixed.scale + 1e-14)


def test_the_scale_is_the_largest_power_of_two_that_cannot_overflow():
    for n in (1, 3, 100):
        for modulus in (2**20, 2**32, Q):
            s = FixedPoint(n, modulus, 5.0).scale
            assert n * (5.0 * s + 1) < modulus / 2 <= n * (5.0 * 2 * s + 1) * (1 + 1e-6) + 1


def test_random_rounding_is_unbiased_and_nearest_is_not():
    fixed = FixedPoint(1, 2**16, 8.0)
    value = np.full(100_000, 0.3 / fixed.scale)
    rounded = fixed.encode(value, 1, np.random.default_rng(1))[:-1]
    assert set(rounded.tolist()) == {0, 1}
    assert abs(rounded.mean() - 0.3) < 5 * 0.458 / 100_000**0.5
    assert not fixed.encode(value, 1)[:-1].any()


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(InputError, match="bits must be large enough to add up 32767 clients, got 16"):
        FixedPoint(2**15 - 1, 2**16)
    with pytest.raises(InputError, match="bits must be large enough for 100 weights of up to 1000, got 16"):
        FixedPoint(100, 2**16, 8.0, 1000)
    with pytest.raises(InputError, match="weight must be from 1 to 5, got 6"):
        FixedPoint(2, most=5).encode(np.zeros(2), 6)
    with pytest.raises(InputError, match=r"range must be at least 8\.5, got 8\.0"):
        FixedPoint(2).encode(np.array([0.0, -8.5]), 1)
    with pytest.raises(InputError, match="update must be finite, got nan"):
        FixedPoint(2).encode(np.array([0.0, np.nan]), 1)


# --- the defense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 17, 32, 48, 64])
@pytest.mark.parametrize("counts", [[1], [1, 3], [5, 1, 2, 2, 7]])
@pytest.mark.parametrize("malicious", [False, True])
def test_the_sum_of_messages_without_masks_is_exact_bit_for_bit(bits, counts, malicious):
    ctx, values = context(counts), rows(len(counts), 33)
    left = SecAgg(bits=bits, malicious=malicious).secure_sum(values, ctx)
    fixed = FixedPoint(len(counts), 2**bits, 8.0, max(counts))
    words = [fixed.encode(v, c) for v, c in zip(values.double().numpy(), counts, strict=True)]
    total = np.array([sum(int(w) for w in col) % 2**bits for col in zip(*words, strict=True)], words[0].dtype)
    assert left.total.tolist() == torch.from_numpy(fixed.mean(total)).float().tolist()
    assert left.survivors == tuple(range(len(counts)))
    assert left.messages.shape == (len(counts), 34)
    assert not (left.messages[0].numpy() == words[0].astype(np.int64)).all()


@pytest.mark.parametrize("bits", [16, 32, 40, 64])
@pytest.mark.parametrize(("rounding", "half"), [("nearest", 1), ("stochastic", 2)])
def test_the_mean_is_within_the_stated_rounding(bits, rounding, half):
    counts = [2, 1, 4]
    ctx, values = context(counts), rows(3, 500).double()
    left = SecAgg(bits=bits, rounding=rounding).secure_sum(values, ctx)
    scale = FixedPoint(3, 2**bits, 8.0, 4).scale
    assert (left.total - ctx.weights @ values).abs().max() <= half * 4 * 3 / (2 * scale * 7) + 1e-14
    assert left.total.dtype == values.dtype


def test_a_bound_on_weights_that_is_public_hides_the_largest_weight():
    ctx, values = context([2, 5]), rows(2, 100).double()
    left = SecAgg(bits=64, most=1000).secure_sum(values, ctx)
    assert (left.total - ctx.weights @ values).abs().max() < 1e-12
    with pytest.raises(InputError, match="secagg, client 11: weight must be from 1 to 4, got 5"):
        SecAgg(most=4).secure_sum(values, ctx)


def test_weights_are_in_no_message():
    """Of clients whose updates are all zero only the weights are left, and their bytes are uniform too."""
    seen = []
    for number in range(400):
        left = SecAgg(bits=16).secure_sum(torch.zeros(2, 1), context([7, 3], number))
        seen += left.messages[:, -1].tolist()
    counts = np.bincount(np.array(seen) >> 12, minlength=16)
    assert chisquare(counts).pvalue > 1e-6


def test_a_single_message_is_uniform_and_tells_nothing_of_its_update():
    values = rows(3, 40_000)
    left = SecAgg().secure_sum(values, context([1] * 3))
    for message, value in zip(left.messages.numpy(), values, strict=True):
        counts = np.bincount(message.astype("<u4").view(np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-6
        noise = torch.from_numpy(message[:-1].astype(float))
        assert abs(torch.corrcoef(torch.stack([noise, value.double()]))[0, 1]) < 5 / 200


def test_keys_are_fresh_so_messages_differ_but_the_mean_does_not():
    values, ctx = rows(3, 100), context([1, 2, 3])
    one, two = (SecAgg().secure_sum(values, ctx) for _ in range(2))
    assert torch.equal(one.total, two.total)
    assert (one.messages == two.messages).double().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_stay_as_they_were_and_the_mean_has_their_type(dtype):
    values = rows(3, 20).to(dtype)
    before = values.clone()
    left = SecAgg().secure_sum(values, context([1, 2, 3]))
    assert torch.equal(values, before)
    assert (left.messages.dtype, left.total.dtype, left.total.shape) == (torch.int64, dtype, (20,))


def test_messages_are_kept_only_where_somebody_looks_on():
    left = SecAgg().secure_sum(rows(3, 20), context([1, 2, 3], witnessed=False))
    assert left.messages.shape == (0, 21)


def test_one_client_has_nothing_to_hide_behind():
    values = rows(1, 50)
    left = SecAgg(cohort=1).secure_sum(values, context([1]))
    assert (left.total - values[0]).abs().max() < 1e-6


def test_a_poisson_cohort_is_divided_by_its_expected_size():
    how = Sampling("poisson", 0.5, 8)
    ctx = RoundContext(0, 1, (1, 2, 3), torch.full((3,), 1 / 4.0), sampling=how, counts=(1, 1, 1))
    values = rows(3, 40).double()
    for defense in (SecAgg(bits=64), SecAgg(bits=64, most=10)):
        left = defense.secure_sum(values, ctx)
        assert (left.total - values.sum(0) / 4).abs().max() < 1e-12
    none = RoundContext(0, 1, (), torch.empty(0), sampling=how)
    assert SecAgg().secure_sum(values[:0], none).survivors == ()


def test_a_sparse_graph_gives_the_same_mean():
    values, ctx = rows(12, 30), context([1] * 12)
    sparse = SecAgg(graph="regular", degree=4, threshold=0.5).secure_sum(values, ctx)
    assert torch.equal(sparse.total, SecAgg().secure_sum(values, ctx).total)


@pytest.mark.parametrize("cls", [DiscreteGaussian, Skellam])
@pytest.mark.parametrize("bits", [24, 32])
def test_noise_on_integers_survives_the_masks_exactly(cls, bits):
    """The released mean is that of the clients' integers, so the sum's guarantee is what it is without."""
    values, ctx = rows(4, 60, 0.05).double(), context([3] * 4)
    noise = cls(bits=12, noise_multiplier=0.5)
    plain = protect(DefenseStack([Clip(norm=1.0), noise]), values, ctx)
    masked = protect(DefenseStack([Clip(norm=1.0), noise, SecAgg(bits=bits)]), values, ctx)
    assert torch.equal(plain.aggregate, masked.aggregate)


PROTOCOLS = [SecAgg, LightSecAgg, MPC, lambda **o: MPC(servers=3, readers=2, **o)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_protocols_give_the_weighted_mean_of_who_survives(protocol):
    values = rows(12, 40).double()
    seen = set()
    for number in range(5):
        ctx = context(list(range(1, 13)), number)
        left = protocol(dropout=0.3, threshold=0.3).secure_sum(values, ctx)
        keep = list(left.survivors)
        w = ctx.weights[keep] / ctx.weights[keep].sum()
        assert (left.total - w @ values[keep]).abs().max() < 1e-5
        assert left.messages.shape == (len(keep), 41)
        seen.add(left.survivors)
    assert len(seen) > 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_protocols_show_uniform_messages_and_give_up_below_the_threshold(protocol):
    left = protocol().secure_sum(torch.full((3, 40_000), 0.1), context([1] * 3))
    for message in left.messages.numpy():
        counts = np.bincount(message.astype("<u4").view(np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-6
    gone = protocol(dropout=0.95, threshold=1.0).secure_sum(rows(10, 5), context([1] * 10))
    assert gone.survivors == ()
    assert not gone.total.any()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_noise_on_integers_survives_all_protocols_exactly(protocol):
    values, ctx = rows(4, 60, 0.05).double(), context([3] * 4)
    noise = DiscreteGaussian(bits=12, noise_multiplier=0.5)
    plain = protect(DefenseStack([Clip(norm=1.0), noise]), values, ctx)
    masked = protect(DefenseStack([Clip(norm=1.0), noise, protocol()]), values, ctx)
    assert torch.equal(plain.aggregate, masked.aggregate)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LightSecAgg(bits=16), "bits must be 32, got 16"),
        (lambda: LightSecAgg(colluding=1.0), "colluding must be from 0 to below 1, got 1.0"),
        (lambda: MPC(servers=1), "servers must be >= 2, got 1"),
        (lambda: MPC(servers=3, readers=4), "readers must be from 2 to 3, got 4"),
        (
            lambda: MPC(servers=3, readers=2, bits=16),
            "bits must be 32 with fewer readers than servers, got 16",
        ),
        (lambda: MPC(bits=65), "bits must be an integer from 16 to 64, got 65"),
    ],
)
def test_impossible_protocols_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_noise_is_for_rows_as_they_are_rounded():
    """The longest that a row of norm 0.5 can be in the sum, against what the noise is for."""
    model = tiny_model()
    layout = Layout.of(model)
    for rounding, bits, clients in (("nearest", 16, 100), ("stochastic", 16, 100), ("nearest", 32, 10)):
        sum_ = SecAgg(bits=bits, rounding=rounding)
        stack = DefenseStack([Clip(norm=0.5), Gaussian(), sum_])
        how = Sampling("full", 1.0, clients)
        local = Local(model, layout.row(model), cross_entropy, layout)
        given = replace(context([1] * clients), local=local, sampling=how)
        (counted,) = (c.sensitivity for d, c in stack._in(given) if d.noises_the_sum)
        encoding, rng = sum_.encoding(clients, 1), np.random.default_rng(0)
        longest = 0.0
        for width in (layout.size, layout.size // 2, layout.size // 9):
            row = np.zeros(layout.size)
            row[:width] = 0.5 / np.sqrt(width)
            words = encoding.encode(row, 1, rng if rounding == "stochastic" else None)
            longest = max(longest, float(np.linalg.norm(encoding.decode(words)[0])))
        assert 0.5 <= longest <= counted <= 1.0 + 0.5 * (rounding == "stochastic")
        assert (counted < 0.5001) == (bits == 32)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_chosen_degree_comes_with_its_threshold(dropout):
    defense = SecAgg(graph="regular", dropout=dropout, threshold=0.5)
    found = defense.terms(context([1] * 1000), 3)
    chosen = parameters(1000, 0.2, max(dropout, 0.05))
    assert (found.graph.degree, found.threshold) == (chosen.degree, chosen.threshold)
    given = SecAgg(graph="regular", degree=10, threshold=0.5).terms(context([1] * 1000), 3)
    assert given.threshold == 5


# --- dropouts in rounds ---------------------------------------------------------------------------------


def test_those_who_drop_out_are_not_in_the_mean_and_the_others_are():
    values = rows(20, 30).double()
    defense = SecAgg(bits=64, dropout=0.3, threshold=0.4)
    seen = set()
    for number in range(6):
        ctx = context(list(range(1, 21)), number)
        left = defense.secure_sum(values, ctx)
        keep = list(left.survivors)
        w = ctx.weights[keep] / ctx.weights[keep].sum()
        assert (left.total - w @ values[keep]).abs().max() < 1e-12
        assert len(left.messages) == len(keep)
        seen.add(left.survivors)
    assert len(seen) > 1


def test_who_drops_out_follows_from_the_seed_and_the_chance_is_as_asked():
    defense = SecAgg(dropout=0.2)
    first, again = defense._silent(context([1] * 20)), defense._silent(context([1] * 20))
    assert first == again
    found = [len(defense._silent(context([1] * 50, n))) for n in range(100)]
    assert abs(sum(found) / 5000 - 0.2) < 5 * (0.16 / 5000) ** 0.5
    rounds = [r for n in range(100) for r in defense._silent(context([1] * 50, n)).values()]
    assert set(rounds) == {0, 1, 2, 3}


def test_who_is_ignored_is_out_whenever_chance_would_have_silenced_it():
    everybody = frozenset(range(10, 30))
    for number in range(20):
        ctx = context([1] * 20, number, meddling=Meddling(ignored=everybody))
        silent = SecAgg(dropout=0.5)._silent(ctx)
        assert silent.keys() == everybody
        assert max(silent.values()) == SecAgg.input_round


def test_below_the_threshold_nobody_survives_and_nothing_is_told():
    left = SecAgg(dropout=0.9, threshold=0.9).secure_sum(rows(10, 5), context([1] * 10))
    assert left.survivors == ()
    assert len(left.messages) == 0
    assert not left.total.any()
    assert "had its round given up: clients that answered in round" in left.refusals[0]


def test_a_server_that_ignores_all_but_one_gets_nothing():
    ctx = context([1] * 6, meddling=Meddling(ignored=frozenset(range(11, 16))))
    left = SecAgg().secure_sum(rows(6, 5), ctx)
    assert left.survivors == ()
    assert not left.total.any()
    weak = SecAgg(threshold=0.1).secure_sum(rows(6, 5), ctx)
    assert weak.survivors == (0,)
    assert (weak.total - rows(6, 5)[0]).abs().max() < 1e-6


def task(*defenses, **changes):
    return Task(tiny_model(), cross_entropy, LocalSpec(lr=0.5), DefenseStack(defenses), seed=3, **changes)


def play(t, clients=9, **changes):
    data = [tiny_examples(4, k) for k in range(clients)]
    return run_round(t, t.layout.row(t.model), range(clients), data, 1, **changes)


def test_a_round_leaves_out_who_dropped_and_names_them():
    outcome = play(task(SecAgg(dropout=0.4, threshold=0.3), stop_on_failure=False))
    gone = {f.client for f in outcome.failures}
    assert gone
    assert set(outcome.clients) == set(range(9)) - gone
    assert {f.reason for f in outcome.failures} == {"dropped out of the secure sum"}
    plain = play(task())
    keep = list(outcome.clients)
    assert (outcome.aggregate - plain.transcript.updates.delta[keep].mean(0)).abs().max() < 1e-6
    t = outcome.transcript
    assert len(t.messages) == len(t.truth) == len(t.updates.delta) == len(outcome.norms) == len(keep)
    assert t.weights.sum() == pytest.approx(1)


def test_a_round_that_is_given_up_changes_nothing_and_shows_nothing():
    outcome = play(task(Clip(norm=1.0), SecAgg(dropout=0.9, threshold=1.0)))
    assert outcome.clients == ()
    assert len(outcome.failures) == 9
    assert not outcome.aggregate.any()
    assert outcome.transcript is None


def test_a_round_that_is_given_up_is_charged_as_if_all_had_taken_part():
    """Also where its events are told again from the clients that failed."""
    noise = Clip(norm=1.0), DiscreteGaussian(noise_multiplier=2.0)
    given_up = play(task(*noise, SecAgg(dropout=0.9, threshold=1.0)))
    whole = play(task(*noise, SecAgg()))
    some = play(task(*noise, SecAgg(dropout=0.4, threshold=0.2)))
    assert given_up.events == whole.events != some.events
    data = [tiny_examples(4, k) for k in range(9)]
    federation = Federation(task(*noise, SecAgg()), data, tiny_examples(9), 1.0)
    everybody = federation.events_of(1)
    assert federation.events_of(1, range(9)) == everybody
    assert federation.events_of(1, [3]) != everybody


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_round_will_cost_is_told_with_those_who_will_drop_out(protocol):
    """A budget that stops before the round that would exceed it must count on their noise missing."""
    noise = Clip(norm=1.0), DiscreteGaussian(noise_multiplier=2.0)
    data = [tiny_examples(4, k) for k in range(9)]
    t = task(*noise, protocol(dropout=0.3, threshold=0.2))
    federation = Federation(t, data, tiny_examples(9), 1.0)
    fewer = 0
    for number in range(1, 7):
        done = run_round(t, t.layout.row(t.model), range(9), data, number)
        assert federation.events_of(number) == done.events
        failed = [f.client for f in done.failures]
        assert federation.events_of(number, failed) == done.events
        fewer += bool(failed)
    assert fewer >= 3


def test_crafted_models_add_up_to_nothing_where_keys_are_bound_to_them():
    """Pasquini et al. 2022: all but the target receive a model under which their gradient is zero."""
    t = task(SecAgg())
    crafted = {c: torch.zeros(t.layout.size) for c in range(1, 9)}
    outcome = play(t, meddling=Meddling(broadcasts=crafted))
    assert outcome.clients == ()
    assert outcome.transcript is None
    open_ = play(task(SecAgg(bind=False)), meddling=Meddling(broadcasts=crafted))
    assert open_.clients == tuple(range(9))


def test_a_run_over_masks_is_the_run_without_them_to_quantisation():
    bare, masked = task(), task(SecAgg())
    w, v = bare.layout.row(bare.model), bare.layout.row(bare.model)
    for number in range(1, 6):
        data = [tiny_examples(3 + k, k) for k in range(5)]
        w = w + run_round(bare, w, range(5), data, number).aggregate
        v = v + run_round(masked, v, range(5), data, number).aggregate
    assert 0 < (w - v).abs().max() < 1e-6


# --- refusals -------------------------------------------------------------------------------------------


def test_within_a_stack_it_clips_first_and_insists_on_its_cohort():
    values = rows(4, 60, 5.0)
    done = protect(DefenseStack([Clip(norm=1.0), SecAgg(cohort=4)], 4), values, context([1] * 4))
    clipped = values / values.norm(dim=1, keepdim=True)
    assert (done.total - clipped.mean(0)).abs().max() < 1e-6
    with pytest.raises(InputError, match="secagg:clients must equal the round's cohort of 2, got 4"):
        DefenseStack([SecAgg(cohort=4)], 2)
    with pytest.raises(InputError, match="clip acts on clients' rows, so it must come before secagg"):
        DefenseStack([SecAgg(), Clip()])
    with pytest.raises(InputError, match="at most one secure sum"):
        DefenseStack([SecAgg(), SecAgg()])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (8.5, r"secagg, client 11: range must be at least 8\.5, got 8\.0"),
        (float("nan"), "secagg, client 11: update must be finite, got nan"),
        (float("-inf"), "secagg, client 11: update must be finite, got inf"),
    ],
)
def test_a_value_outside_the_range_is_refused_by_client(value, message):
    values = torch.zeros(2, 3)
    values[1, 2] = value
    with pytest.raises(InputError, match=message):
        SecAgg().secure_sum(values, context([1, 1]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cohort": 0}, "clients must be >= 1, got 0"),
        ({"bits": 15}, "bits must be an integer from 16 to 64, got 15"),
        ({"bits": 65}, "bits must be an integer from 16 to 64, got 65"),
        ({"value_range": 0.0}, r"range must be a finite number >= 1e-30, got 0\.0"),
        ({"value_range": float("inf")}, "range must be a finite number >= 1e-30, got inf"),
        ({"threshold": 0.0}, "threshold must be above 0 and at most 1, got 0.0"),
        ({"threshold": 1.1}, "threshold must be above 0 and at most 1, got 1.1"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"most": 0}, "max_examples must be >= 1, got 0"),
        ({"graph": "star"}, "graph must be one of"),
        ({"degree": 4}, "graph must be regular where a degree is given, got 'complete'"),
        ({"graph": "regular", "malicious": True}, "secagg:graph must be complete with malicious=true"),
    ],
)
def test_impossible_options_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        SecAgg(**option)


def test_rounds_that_could_not_hide_or_add_up_are_refused():
    two = torch.zeros(2, 3)
    with pytest.raises(InputError, match="secagg:clients must equal the round's cohort of 2, got 4"):
        SecAgg(cohort=4).secure_sum(two, context([1, 1]))
    same = replace(context([1, 1]), clients=(7, 7))
    with pytest.raises(InputError, match=r"clients of a round must be distinct, got \(7, 7\)"):
        SecAgg().secure_sum(two, same)
    with pytest.raises(InputError, match="must know every client's number of examples"):
        SecAgg().secure_sum(two, replace(context([1, 3]), counts=()))
    with pytest.raises(InputError, match="secagg:degree must be below the cohort of 5, one of the two even"):
        DefenseStack([SecAgg(graph="regular", degree=3)], 5)
    with pytest.raises(InputError, match="bits must be large enough to add up 40000 clients"):
        DefenseStack([SecAgg(bits=16)], 40_000)
