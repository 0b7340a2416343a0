"""Secure aggregation: exact sums, masks that hide, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import protect
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from scipy.stats import chisquare

from defenses.clip import Clip
from defenses.secagg import Member, SecAgg, decode, encode, expand, server_sum, word
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


@pytest.mark.parametrize("bits", [16, 17, 31, 32, 48, 63, 64])
@pytest.mark.parametrize("d", [1, 33])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 3.0], [5.0, 1.0, 2.0, 2.0, 7.0]])
def test_sum_of_masked_messages_is_exact_bit_for_bit(bits, d, weights):
    ctx, values = context(weights), rows(len(weights), d)
    defense = SecAgg(bits=bits)
    messages, total = defense.secure_sum(values, ctx)
    modulus, scale = 2**bits, defense.scale(len(weights))
    summed = [sum(int(m) for m in column) % modulus for column in messages.T.tolist()]
    assert summed == slow_sum(values, ctx.weights, scale, bits)
    signed = [v - modulus if v >= modulus // 2 else v for v in summed]
    assert total.tolist() == torch.tensor([v / scale for v in signed]).tolist()


@pytest.mark.parametrize("bits", [16, 32, 40, 64])
def test_mean_is_within_the_stated_rounding(bits):
    ctx, values = context([2.0, 1.0, 4.0]), rows(3, 500).double()
    _, total = SecAgg(bits=bits).secure_sum(values, ctx)
    bound = 3 / (2 * SecAgg(bits=bits).scale(3)) + 1e-14
    assert (total - ctx.weights @ values).abs().max() <= bound
    assert total.dtype == values.dtype


@pytest.mark.parametrize("bits", [16, 32, 50, 64])
def test_largest_allowed_values_do_not_wrap(bits):
    values = torch.full((7, 4), 8.0)
    values[:, 1] = -8.0
    _, total = SecAgg(bits=bits).secure_sum(values, context([1.0] * 7))
    bound = 7 / (2 * SecAgg(bits=bits).scale(7)) + 1e-14
    assert total.tolist() == pytest.approx([8.0, -8.0, 8.0, 8.0], abs=bound)


@pytest.mark.parametrize("bits", [16, 20, 32, 63, 64])
def test_masks_cancel_and_messages_stay_below_the_modulus(bits):
    """Of clients who all send zero the messages are the masks: none is zero, and their sum is."""
    messages, total = SecAgg(bits=bits).secure_sum(torch.zeros(3, 50), context([1.0] * 3))
    masks = [[m % 2**bits for m in row] for row in messages.tolist()]
    assert all(any(row) for row in masks)
    assert [sum(column) % 2**bits for column in zip(*masks, strict=True)] == [0] * 50
    assert not total.any()
    if bits < 64:
        assert messages.min() >= 0
        assert 2 ** (bits - 1) <= messages.max().item() < 2**bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_stay_as_they_were_and_the_mean_has_their_type(dtype):
    values = rows(3, 20).to(dtype)
    before = values.clone()
    messages, total = SecAgg().secure_sum(values, context([1.0, 2.0, 3.0]))
    assert torch.equal(values, before)
    assert (messages.dtype, messages.shape) == (torch.int64, (3, 20))
    assert (total.dtype, total.shape, total.device) == (dtype, (20,), values.device)


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


def test_seed_binds_protocol_round_and_both_members_in_order():
    a, b = Member(9), Member(4)
    secret = b._key.exchange(a._key.public_key())
    info = b"fltoolkit secagg pairwise mask v1|7|4|9|4"
    seed = HKDF(SHA256(), length=32, salt=None, info=info).derive(secret)
    like = np.zeros(64, "<u4")
    assert (a._mask(4, b.public_key, 7, like) == expand(seed, like)).all()


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
    for bits in (16, 19, 32, 33, 64):
        assert encode(values, 4.0, bits).tolist() == [2**bits - 6, 0, 1, 12]
        assert decode(server_sum([encode(values, 4.0, bits)]), 4.0, bits).tolist() == values.tolist()


def test_words_are_the_smallest_that_hold_the_bits():
    assert [word(b).itemsize for b in (16, 17, 32, 33, 64)] == [2, 4, 4, 8, 8]


def test_one_client_has_nothing_to_hide_behind():
    values = rows(1, 50)
    messages, total = SecAgg(cohort=1).secure_sum(values, context([1.0]))
    expected = encode(values.double().numpy()[0], SecAgg().scale(1), 32)
    assert (messages[0].numpy() == expected.astype(np.int64)).all()
    assert (total - values[0]).abs().max() < 1e-6


def test_within_a_stack_it_clips_first_and_insists_on_its_cohort():
    values = rows(4, 60, 5.0)
    done = protect(DefenseStack([Clip(norm=1.0), SecAgg(cohort=4)], 4), values, context([1.0] * 4))
    clipped = values / values.norm(dim=1, keepdim=True)
    assert done.messages.dtype == torch.int64
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
        (8.5, r"secagg:range must be at least the largest update entry, 8\.5 of client 11, got 8\.0"),
        (-9.0, r"secagg:range must be at least the largest update entry, 9\.0 of client 11, got 8\.0"),
        (float("nan"), "update of client 11 must be finite, got nan"),
        (float("-inf"), "update of client 11 must be finite, got inf"),
    ],
)
def test_a_value_outside_the_range_is_refused_by_client(value, message):
    values = torch.zeros(2, 3)
    values[1, 2] = value
    with pytest.raises(InputError, match=message):
        SecAgg().secure_sum(values, context([1.0, 1.0]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cohort": 0}, "clients must be >= 1, got 0"),
        ({"bits": 15}, "bits must be an integer from 16 to 64, got 15"),
        ({"bits": 65}, "bits must be an integer from 16 to 64, got 65"),
        ({"value_range": 0.0}, r"range must be a finite number >= 1e-30, got 0\.0"),
        ({"value_range": float("nan")}, "range must be a finite number >= 1e-30, got nan"),
        ({"value_range": float("inf")}, "range must be a finite number >= 1e-30, got inf"),
    ],
)
def test_impossible_options_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        SecAgg(**option)


def test_rounds_that_could_not_hide_or_add_up_are_refused():
    two = torch.zeros(2, 3)
    with pytest.raises(InputError, match="secagg:clients must equal the round's cohort of 2, got 4"):
        SecAgg(cohort=4).secure_sum(two, context([1.0, 1.0]))
    same = RoundContext(0, 1, (7, 7), torch.tensor([0.5, 0.5]))
    with pytest.raises(InputError, match=r"clients of a round must be distinct, got \(7, 7\)"):
        SecAgg().secure_sum(two, same)
    with pytest.raises(InputError, match="bits must be large enough to add up 32766 clients, got 16"):
        SecAgg(bits=16).scale(2**15 - 2)
