"""Secure aggregation: exact sums, masks that hide, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from defenses.clip import Clip
from defenses.secagg import Member, SecAgg, decode, encode, expand, server_sum
from fltoolkit.defense import DefenseStack, RoundContext
from fltoolkit.errors import InputError


def context(weights, number=1):
    w = torch.tensor(weights, dtype=torch.float64)
    return RoundContext(0, number, tuple(range(10, 10 + len(w))), w / w.sum())


def rows(k, d, scale=1.0, seed=0):
    return scale * torch.randn(k, d, generator=torch.Generator().manual_seed(seed))


def slow_sum(values, weights, scale, bits):
    """The encoded sum with Python's own integers."""
    weights = weights / weights.sum()
    modulus, total = 2**bits, [0] * values.shape[1]
    for row, w in zip(values.double().tolist(), weights.tolist(), strict=True):
        total = [(t + round(v * w * scale)) % modulus for t, v in zip(total, row, strict=True)]
    return total


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 3.0], [5.0, 1.0, 2.0, 2.0, 7.0]])
def test_sum_of_masked_messages_is_exact_bit_for_bit(bits, weights):
    ctx, values = context(weights), rows(len(weights), 33)
    defense = SecAgg(bits=bits)
    messages, total = defense.secure_sum(values, ctx)
    modulus, scale = 2**bits, defense.scale(len(weights))
    summed = [sum(int(m) for m in column) % modulus for column in messages.T.tolist()]
    assert summed == slow_sum(values, ctx.weights, scale, bits)
    signed = [v - modulus if v >= modulus // 2 else v for v in summed]
    assert total.tolist() == torch.tensor([v / scale for v in signed]).tolist()


@pytest.mark.parametrize("bits", [32, 64])
def test_mean_is_within_the_stated_rounding(bits):
    ctx, values = context([2.0, 1.0, 4.0]), rows(3, 500).double()
    _, total = SecAgg(bits=bits).secure_sum(values, ctx)
    bound = 3 / (2 * SecAgg(bits=bits).scale(3)) + 1e-14
    assert (total - ctx.weights @ values).abs().max() <= bound
    assert total.dtype == values.dtype


def test_largest_allowed_values_do_not_wrap():
    values = torch.full((7, 4), 8.0)
    values[:, 1] = -8.0
    _, total = SecAgg().secure_sum(values, context([1.0] * 7))
    assert total.tolist() == pytest.approx([8.0, -8.0, 8.0, 8.0], abs=1e-7)


def byte_p_value(message):
    counts = np.bincount(message.astype("<u4").view(np.uint8), minlength=256)
    return chisquare(counts).pvalue


def test_a_single_message_is_uniform_noise_and_an_unmasked_one_is_not():
    constant = torch.full((3, 40_000), 0.123)
    messages, _ = SecAgg().secure_sum(constant, context([1.0] * 3))
    for m in messages.numpy():
        assert byte_p_value(m) > 1e-6
    alone, _ = SecAgg().secure_sum(constant[:1], context([1.0]))
    assert byte_p_value(alone[0].numpy()) < 1e-6


def test_messages_tell_nothing_apart_from_their_sum():
    """Correlation of a message with the update it hides is that of chance (5 standard deviations)."""
    values = rows(2, 40_000)
    messages, _ = SecAgg().secure_sum(values, context([1.0, 1.0]))
    noise = messages.double() - 2.0**31
    for k in range(2):
        assert abs(torch.corrcoef(torch.stack([noise[k], values[k].double()]))[0, 1]) < 5 / 200


def test_both_ends_derive_one_mask_and_no_other_pair_or_round_does():
    a, b, c = Member(1), Member(2), Member(3)
    like = np.zeros(64, "<u4")
    mask = a._mask(2, b.public_key, 7, like)
    assert (mask == b._mask(1, a.public_key, 7, like)).all()
    for other in (
        a._mask(3, c.public_key, 7, like),
        a._mask(2, b.public_key, 8, like),
        b._mask(3, c.public_key, 7, like),
    ):
        assert (mask == other).mean() < 0.1


def test_keys_are_fresh_so_messages_differ_but_the_mean_does_not():
    values, ctx = rows(3, 100), context([1.0, 2.0, 3.0])
    (first, mean), (second, again) = (SecAgg().secure_sum(values, ctx) for _ in range(2))
    assert torch.equal(mean, again)
    assert (first == second).double().mean() < 0.1


def test_keystream_is_aes_ctr():
    """First block: AES-256 of the zero counter under the zero key (NIST SP 800-38A's cipher, known value)."""
    assert expand(bytes(32), np.zeros(4, "<u4")).tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_encoding_round_trips_signed_values():
    values = np.array([-1.5, 0.0, 0.25, 3.0])
    assert decode(server_sum([encode(values, 4.0, 32)]), 4.0).tolist() == values.tolist()


def test_one_client_has_nothing_to_hide_behind():
    values = rows(1, 50)
    messages, total = SecAgg(cohort=1).secure_sum(values, context([1.0]))
    expected = encode(values.double().numpy()[0], SecAgg().scale(1), 32)
    assert (messages[0].numpy() == expected.astype(np.int64)).all()
    assert (total - values[0]).abs().max() < 1e-6


def test_within_a_stack_it_clips_first_and_insists_on_its_cohort():
    values = rows(4, 60, 5.0)
    done = DefenseStack([Clip(norm=1.0), SecAgg(cohort=4)], 4).protect(values, context([1.0] * 4))
    clipped = values / values.norm(dim=1, keepdim=True)
    assert done.messages_hidden
    assert (done.total - clipped.mean(0)).abs().max() < 1e-6
    with pytest.raises(InputError, match="secagg:clients must equal the round's cohort of 2, got 4"):
        DefenseStack([SecAgg(cohort=4)], 2)
    with pytest.raises(InputError, match="clip acts on clients' rows, so it must come before secagg"):
        DefenseStack([SecAgg(), Clip()])
    with pytest.raises(InputError, match="at most one secure sum"):
        DefenseStack([SecAgg(), SecAgg()])


@pytest.mark.parametrize("value", [8.01, -9.0, float("nan"), float("inf")])
def test_a_value_outside_the_range_is_refused_by_client(value):
    values = torch.zeros(2, 3)
    values[1, 2] = value
    with pytest.raises(InputError, match=r"secagg:range must be at least .* of client 11, got 8"):
        SecAgg().secure_sum(values, context([1.0, 1.0]))


@pytest.mark.parametrize("option", [{"cohort": 0}, {"bits": 31}, {"value_range": 0.0}, {"value_range": -1.0}])
def test_impossible_options_are_refused(option):
    with pytest.raises(InputError, match="must be"):
        SecAgg(**option)
