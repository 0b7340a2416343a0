"""Defenses that mask or compress updates keep what their docstrings guarantee, and remember what they owe.

Statistical tests state their sample: with N independent draws a mean of spread σ is off by 5 σ / √N in one of
two million runs; all draws are seeded, so that a test that passes keeps passing.
"""

from __future__ import annotations

from itertools import product
from math import inf, prod, sqrt

import pytest
import torch
from conftest import observe, plain_gradient, protect, tiny_examples, tiny_model
from torch.linalg import vector_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from defenses.clip import Clip
from defenses.gaussian import Gaussian
from defenses.prune import Prune
from defenses.quantise import Quantise
from defenses.randk import RandK
from defenses.sign import Sign
from defenses.subspace import Subspace
from defenses.topk import TopK
from fltoolkit import registry
from fltoolkit.accounting import epsilon_by_view
from fltoolkit.defense import DefenseStack, Local, RoundContext
from fltoolkit.errors import InputError
from fltoolkit.inversion.adaptation import adapt
from fltoolkit.inversion.distance import Masked, Signs, cosine, relative
from fltoolkit.loss import cross_entropy
from fltoolkit.projection import Projection
from fltoolkit.specs import construct
from fltoolkit.types import Layout, LocalSpec

CLIENTS, D = 4, 200

FEEDBACK = [TopK(0.1), RandK(0.1), Sign()]
FORGETFUL = [
    TopK(0.1, error_feedback=False),
    RandK(0.1, error_feedback=False),
    RandK(0.1, error_feedback=False, unbiased=True),
    Prune(0.7),
    Sign(error_feedback=False),
    Sign("none", 0.01, error_feedback=False),
    Quantise(3),
    Quantise(3, bucket=64),
    Subspace(0.3),
    Subspace(0.3, "rotate"),
]
EVERY = FEEDBACK + FORGETFUL


def label(defense):
    return ",".join(str(v) for v in defense.public().values())


each = pytest.mark.parametrize("defense", EVERY, ids=label)


def rows(seed=0, clients=CLIENTS, size=D, dtype=torch.float32):
    """Rows of very different lengths, the entries of each of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(clients, size, generator=generator, dtype=torch.float64)
    return (normal**3 * torch.logspace(-4, 3, clients, dtype=torch.float64)[:, None]).to(dtype)


def context(number=1, clients=range(CLIENTS), memory=None, seed=5, local=None):
    clients = tuple(clients)
    weights = torch.full((len(clients),), 1 / max(1, len(clients)))
    memory = {} if memory is None else memory
    return RoundContext(seed, number, clients, weights, memory=memory, local=local, name="it")


def layers(*shapes):
    layout = Layout(tuple(f"p{i}" for i in range(len(shapes))), shapes)
    return Local(torch.nn.Identity(), torch.zeros(layout.size), cross_entropy, layout)


def squared(v):
    return v.double().square().sum(1)


# What all of them share


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_in_rows_out_arguments_untouched_and_a_repeat_is_the_same(defense, dtype):
    given, memory = rows(dtype=dtype), {}
    before = given.clone()
    sent = defense.clients(given, context(memory=memory))
    assert torch.equal(given, before)
    assert (sent.shape, sent.dtype, sent.device) == (given.shape, given.dtype, given.device)
    assert not torch.equal(sent, given)
    assert torch.equal(sent, defense.clients(given, context()))
    again = given.clone()
    kept = {key: value.clone() for key, value in memory.items()}
    defense.clients(again, context(2, memory=dict(memory)))
    assert all(torch.equal(memory[key], kept[key]) for key in kept), "remembered values are never overwritten"


class OneDevice(TorchDispatchMode):
    """Refuses to compute with tensors of two devices, which the device "meta" lets pass here and there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor) and t.dim()]
        assert len({t.device for t in given}) <= 1, func
        return func(*args, **(kwargs or {}))


@each
def test_rows_stay_on_their_device(defense):
    """On "meta", which knows shapes only; what clients are owed comes back from a checkpoint on the CPU."""
    memory = {}
    defense.clients(rows(), context(memory=memory))
    far = rows().to("meta")
    with OneDevice():
        sent = defense.clients(far, context(2, memory=memory))
    assert (sent.device.type, sent.shape, sent.dtype) == ("meta", far.shape, far.dtype)
    assert all(m.device.type == "meta" for m in memory.values())


@each
def test_a_row_does_not_depend_on_who_else_is_in_the_cohort(defense):
    """Cohorts stream through in chunks."""
    given = rows()
    whole = defense.clients(given, context())
    parts = [defense.clients(given[a : a + 2], context(clients=range(a, a + 2))) for a in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0)
    assert defense.clients(given[:0], context(clients=())).shape == (0, D)


@each
def test_zero_stays_zero(defense):
    sent = defense.clients(torch.zeros(CLIENTS, D), context())
    assert torch.equal(sent, torch.zeros(CLIENTS, D))


@each
def test_no_differential_privacy(defense):
    ctx = context()
    assert defense.privacy(ctx) == ()
    events = DefenseStack([Clip(1.0), defense]).events(ctx)
    assert set(epsilon_by_view([events], False, 1e-5).values()) == {inf}
    assert "no differential privacy" in " ".join((type(defense).__doc__ or "").lower().split())


@each
def test_the_command_line_makes_it_and_public_tells_all_options(defense):
    public = dict(defense.public())
    assert public.pop("name") == type(defense).name
    options = {key: str(value) for key, value in public.items() if value is not None}
    assert construct("defense", type(defense), options) == defense
    assert registry.describe(type(defense)).count(". ") == 0


@pytest.mark.parametrize("defense", FORGETFUL, ids=label)
def test_no_row_is_longer_than_the_bound(defense):
    """For normal rows, for one large entry, for all alike, and for buckets just past a level."""
    shapes = [rows(), torch.eye(CLIENTS, D), torch.ones(CLIENTS, D), 1 + 0.01 * rows(1).sign()]
    for given, local in product(shapes, [None, layers((D,))]):
        unit = 2.0 * given / vector_norm(given, dim=1, keepdim=True)
        ctx = context(local=local)
        bound = defense.bound_in(2.0, ctx)
        if bound is not None:
            norms = vector_norm(defense.clients(unit, ctx).double(), dim=1)
            assert (norms <= bound * (1 + 1e-6)).all(), (bound, norms)
            assert bound <= defense.bound(2.0)
        assert defense.bound(None) is None


def test_which_bound_each_gives():
    assert [d.bound(2.0) for d in FEEDBACK] == [None] * 3
    kept = [TopK(0.1, False), RandK(0.1, False), Prune(), Sign("mean", error_feedback=False), Subspace()]
    assert [d.bound(2.0) for d in kept] == [2.0] * 5
    assert Sign("none", error_feedback=False).bound(2.0) is None
    assert Quantise(4).bound(2.0) is None
    assert Quantise(4, bucket=64).bound(2.0) == pytest.approx(2 * (1 + 8 / 4))
    assert Quantise(1, bucket=4).bound(2.0) == pytest.approx(2 * 2)
    free = RandK(0.1, False, unbiased=True)
    assert free.bound_in(2.0, context(local=layers((D,)))) == pytest.approx(2 * 10)
    assert free.bound(2.0) == pytest.approx(2 * 15)
    assert RandK(1.0, False, unbiased=True).bound(2.0) == 2.0


def test_the_bound_of_unbiased_randk_holds_for_every_number_of_parameters():
    for fraction in (0.9, 0.3, 0.07):
        free = RandK(fraction, False, unbiased=True)
        exact = [free.bound_in(1.0, context(local=layers((size,)))) for size in range(1, 400)]
        assert max(exact) <= free.bound(1.0)
    assert max(exact) > 0.95 * free.bound(1.0)


def test_noise_after_a_bound_is_as_large_as_the_bound_says():
    """Gaussian takes its sensitivity from the defense before it; with feedback it must find none."""
    with pytest.raises(InputError, match="gaussian must come after a clip"):
        DefenseStack([Clip(0.5), TopK(), Gaussian(placement="client")])
    size = 20000
    zero = torch.zeros(2, size)
    ctx = context(clients=(0, 1), local=layers((size,)))
    for defense, longer in ((TopK(0.1, False), 1), (RandK(0.1, False, unbiased=True), 10)):
        stack = DefenseStack([Clip(0.5), defense, Gaussian(1.0, "client")])
        std = protect(stack, zero, ctx).messages.std().item()
        assert std == pytest.approx(0.5 * longer, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0.0), r"fraction must be in \(0, 1\], got 0\.0"),
        (lambda: TopK(1.1), r"fraction must be in \(0, 1\], got 1\.1"),
        (lambda: TopK(float("nan")), r"fraction must be in \(0, 1\], got nan"),
        (lambda: RandK(-1.0), r"fraction must be in \(0, 1\], got -1\.0"),
        (lambda: RandK(unbiased=True), "unbiased must be false with error_feedback, got True"),
        (lambda: Prune(1.0), r"ratio must be in \[0, 1\), got 1\.0"),
        (lambda: Prune(-0.1), r"ratio must be in \[0, 1\), got -0\.1"),
        (lambda: Sign("max"), r"scale must be one of \('mean', 'none'\), got 'max'"),
        (lambda: Sign("none", 0.0, False), r"step must be a finite number > 0, got 0\.0"),
        (lambda: Sign("none", inf, False), "step must be a finite number > 0, got inf"),
        (lambda: Sign("none"), "error_feedback must be false with scale 'none', got True"),
        (lambda: Quantise(0), "levels must be >= 1, got 0"),
        (lambda: Quantise(bucket=0), "bucket must be >= 1, got 0"),
        (lambda: Subspace(0.0), r"fraction must be in \(0, 1\], got 0\.0"),
        (lambda: Subspace(kind="fold"), r"kind must be one of \('mask', 'rotate'\), got 'fold'"),
        (lambda: Subspace(seed=-1), "seed must be >= 0, got -1"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# topk


@pytest.mark.parametrize(("fraction", "kept"), [(0.1, 20), (1.0, D), (0.0001, 1), (0.0124, 2), (0.999, D)])
def test_topk_keeps_the_largest(fraction, kept):
    v = rows()
    sent = TopK(fraction, False).clients(v, context())
    assert ((sent != 0).sum(1) == kept).all()
    assert torch.equal(sent[sent != 0], v[sent != 0])
    for a, b in zip(v, sent, strict=True):
        left = a[b == 0].abs()
        assert not len(left) or left.max() <= b[b != 0].abs().min()
    lost = squared(v - sent)
    assert (lost <= (1 - kept / D) * squared(v) * (1 + 1e-6)).all()


def test_topk_keeps_no_more_than_k_of_equals_and_loses_just_what_it_may():
    v = torch.ones(CLIENTS, D)
    sent = TopK(0.1, False).clients(v, context())
    assert ((sent != 0).sum(1) == 20).all()
    assert squared(v - sent).tolist() == pytest.approx([0.9 * D] * CLIENTS)


# randk


def test_randk_keeps_k_entries_that_differ_between_clients_rounds_and_seeds():
    v = rows()
    kept = [RandK(0.1, False).clients(v, c) != 0 for c in (context(), context(2), context(seed=6), context())]
    assert all((k.sum(1) == 20).all() for k in kept)
    assert torch.equal(kept[0], kept[3])
    patterns = {tuple(row.tolist()) for k in kept[:3] for row in k}
    assert len(patterns) == 3 * CLIENTS
    sent = RandK(0.1, False).clients(v, context())
    assert torch.equal(sent[kept[0]], v[kept[0]])
    free = RandK(0.1, False, unbiased=True).clients(v, context())
    torch.testing.assert_close(free, 10 * sent)


@pytest.mark.parametrize(("unbiased", "mean", "lost"), [(False, 0.2, 0.8), (True, 1.0, 4.0)])
def test_randk_in_the_mean(unbiased, mean, lost):
    """20 000 draws, k = 2 of D = 10: an entry's mean is off by at most 5 standard errors, the squared error
    by 2 % of itself."""
    n, size = 20_000, 10
    v = torch.randn(size, generator=torch.Generator().manual_seed(1)) + 2
    ctx = context(clients=range(n))
    sent = RandK(0.2, False, unbiased).clients(v.expand(n, size), ctx).double()
    error = sqrt(0.2 * 0.8 / n) * v.abs().double() * (5 if unbiased else 1)
    assert ((sent.mean(0) - mean * v).abs() <= 5 * error).all()
    measured = (squared(v - sent).mean() / v.double().square().sum()).item()
    assert measured == pytest.approx(lost, rel=0.02)


# prune


def test_prune_cuts_the_smallest_of_every_layer():
    """Against sorting each tensor by itself."""
    shapes = ((10, 15), (15,), (1,), (34,))
    v = rows(3)
    v[:, 150:] *= 1e-3
    sent = Prune(0.7).clients(v, context(local=layers(*shapes)))
    start = 0
    for shape in shapes:
        n = prod(shape)
        cut = min(n - 1, round(0.7 * n))
        a, b = v[:, start : start + n], sent[:, start : start + n]
        expected = a.clone()
        for row, order in zip(expected, a.abs().argsort(dim=1), strict=True):
            row[order[:cut]] = 0
        assert torch.equal(b, expected)
        assert ((b == 0).sum(1) == cut).all()
        start += n


def test_prune_without_a_model_takes_the_whole_row_and_never_all_of_it():
    v = rows(4)
    sent = Prune(0.7).clients(v, context())
    assert torch.equal(sent, TopK(0.3, False).clients(v, context()))
    assert torch.equal(Prune(0.0).clients(v, context()), v)
    assert ((Prune(0.9999).clients(v, context()) != 0).sum(1) == 1).all()


# sign


def test_sign_with_the_mean_magnitude():
    v = rows(5)
    v[0, :50] = 0
    sent = Sign(error_feedback=False).clients(v, context())
    assert torch.equal(sent.sign(), v.sign())
    magnitude = v.double().abs().sum(1) / D
    torch.testing.assert_close(sent.abs().double().amax(1), magnitude, rtol=1e-6, atol=0)
    assert all(len(row[row != 0].abs().unique()) == 1 for row in sent)
    density = v.double().abs().sum(1) ** 2 / (D * squared(v))
    lost = squared(v - sent)
    torch.testing.assert_close(lost[1:], ((1 - density) * squared(v))[1:], rtol=1e-5, atol=0)
    assert lost[0] < (1 - density[0]) * squared(v)[0], "zeros are kept, which loses less"


def test_sign_with_a_step():
    v = rows(5)
    v[0, :50] = 0
    sent = Sign("none", 0.25, error_feedback=False).clients(v, context())
    assert torch.equal(sent, 0.25 * v.sign())
    assert (sent[0] == 0).sum() == 50


# quantise


@pytest.mark.parametrize(
    ("levels", "bucket"), [(1, None), (4, None), (1000, None), (3, 64), (2, 1), (5, 999)]
)
def test_quantised_entries_are_the_two_levels_next_to_the_truth(levels, bucket):
    v = rows(6).double()
    sent = Quantise(levels, bucket).clients(v, context())
    for start in range(0, D, bucket or D):
        a, b = (t[:, start : start + (bucket or D)] for t in (v, sent))
        step = vector_norm(a, dim=1, keepdim=True) / levels
        whole = b / step
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-9)
        assert (whole.abs() <= levels + 1e-9).all()
        assert ((a - b).abs() < step * (1 + 1e-9)).all()
        assert (a * b >= 0).all()


@pytest.mark.parametrize(("levels", "bucket"), [(1, None), (4, None), (40, None), (2, 8)])
def test_quantise_is_unbiased_with_the_stated_variance(levels, bucket):
    """20 000 draws of D = 20 entries: each entry's mean within 5 standard errors, which for a level drawn of
    two a step apart are at most step / (2 √N); the squared error within 3 % of the exact Σ p (1 − p) step².
    """
    n, size = 20_000, 20
    v = rows(7, 1, size)[0].double()
    sent = Quantise(levels, bucket).clients(v.float().expand(n, size), context(clients=range(n))).double()
    parts = v.split(bucket or size)
    step = torch.cat([(p.norm() / levels).expand(len(p)) for p in parts])
    assert ((sent.mean(0) - v).abs() <= 5 * step / (2 * sqrt(n)) + 1e-6 * step).all()
    p = (v.abs() / step).frac()
    exact = (p * (1 - p) * step.square()).sum()
    measured = squared(sent - v).mean()
    assert measured.item() == pytest.approx(exact.item(), rel=0.03)
    width = bucket or size
    bound = min(width / levels**2, sqrt(width) / levels)
    assert measured <= bound * v.square().sum()
    covariance = torch.corrcoef((sent - v)[:, p * (1 - p) > 0.01].T)
    assert (covariance - torch.eye(len(covariance))).abs().max() < 5 / sqrt(n)


def test_quantise_draws_anew_for_every_client_and_round():
    v = torch.ones(3, 50)
    first, second = (Quantise(1).clients(v, context(i, range(3))) for i in (1, 2))
    assert len({tuple(r.tolist()) for r in [*first, *second]}) == 6


@pytest.mark.parametrize(
    ("levels", "scaled", "reached"), [(1, (1.0, 1.0), sqrt(2)), (8, (4.5, 3.5, 4.5, 3.3), sqrt(82) / 8)]
)
def test_rounding_up_everywhere_stays_within_the_bound(levels, scaled, reached):
    """Among 1 000 draws there is one that rounds every entry up, which is the longest that a row can get."""
    v = torch.tensor(scaled) / torch.tensor(scaled).norm()
    defense = Quantise(levels, bucket=len(v))
    longest = vector_norm(defense.clients(v.expand(1000, -1), context(clients=range(1000))), dim=1).max()
    assert longest.item() == pytest.approx(reached)
    assert longest <= defense.bound(1.0) * (1 + 1e-6)


def test_quantise_holds_its_levels_at_the_edge():
    """One entry carries the whole norm: its share of it, in single precision, must not come out above 1."""
    v = torch.logspace(-30, 30, 5000)[:, None]
    sent = Quantise(7, bucket=1).clients(v, context(clients=range(5000)))
    torch.testing.assert_close(sent, v, rtol=1e-6, atol=0)


# subspace


@pytest.mark.parametrize("kind", ["mask", "rotate"])
@pytest.mark.parametrize("size", [1, 2, 3, 37, 64, 65, 127])
def test_subspace_is_an_orthogonal_projection(kind, size):
    defense = Subspace(0.3, kind)
    matrix = defense.clients(torch.eye(size, dtype=torch.float64), context(clients=range(size)))
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, matrix)
    d = max(1, round(0.3 * size))
    assert matrix.trace().item() == pytest.approx(d)
    assert torch.linalg.matrix_rank(matrix) == d
    v = rows(8, size=size)
    sent = defense.clients(v, context())
    expected = v.double() @ matrix
    torch.testing.assert_close(sent.double(), expected, rtol=0, atol=1e-5 * float(v.abs().max()))
    again = defense.clients(sent, context())
    assert (vector_norm(again - sent, dim=1) <= 1e-5 * vector_norm(v, dim=1)).all()
    assert (squared(sent) <= squared(v) * (1 + 1e-6)).all()
    torch.testing.assert_close(squared(v - sent), squared(v) - squared(sent), rtol=1e-4, atol=1e-9)


def test_all_clients_share_the_subspace_of_a_round_and_rounds_differ():
    for kind in ("mask", "rotate"):
        v = torch.ones(CLIENTS, D)
        defense = Subspace(0.3, kind)
        sent = [defense.clients(v, context(i)) for i in (1, 2)]
        assert torch.equal(sent[0], sent[0][:1].expand_as(sent[0]))
        assert not torch.equal(sent[0], sent[1])
        assert not torch.equal(sent[0], Subspace(0.3, kind, seed=1).clients(v, context()))
        assert torch.equal(sent[0], defense.clients(v, context(seed=6))), "the run's seed is secret"


def test_every_direction_is_kept_alike_in_the_mean():
    """2 000 rounds: E P Pᵀ = (d/D) I. An entry's mean is off by less than 5 √(0.25 / 2000) = 0.056."""
    for kind in ("mask", "rotate"):
        eye = torch.eye(6, dtype=torch.float64)
        total = sum(Subspace(0.5, kind).projection(6, i)(eye) for i in range(2000)) / 2000
        torch.testing.assert_close(total, 0.5 * eye, rtol=0, atol=0.056)


def test_public_and_the_round_are_all_that_an_adversary_needs():
    """Rebuilt from what `Observation.defenses` and `Observation.round` hold, the projection leaves messages
    as they are and takes the truth to them."""
    v = rows(10)
    for kind in ("mask", "rotate"):
        stack = DefenseStack([Subspace(0.2, kind, seed=3)])
        messages = stack.clients(v, context(7))
        (public,) = stack.public()
        theirs = Subspace(**{k: x for k, x in public.items() if k != "name"}).projection(D, 7)
        assert isinstance(theirs, Projection)
        torch.testing.assert_close(theirs(v), messages)
        assert theirs == Subspace(0.2, kind, seed=3).projection(D, 7)
        assert theirs != Subspace(0.2, kind, seed=3).projection(D, 8)


# Error feedback


def played(stack, cohorts, memory, size=D):
    """What every client sent and what it had to send, summed over rounds, in float64; and the contexts."""
    sent, wanted = torch.zeros(2, CLIENTS, size, dtype=torch.float64)
    for number, cohort in enumerate(cohorts, 1):
        v = torch.randn(len(cohort), size, generator=torch.Generator().manual_seed(number))
        messages = stack.clients(v, context(number, cohort, memory))
        sent[list(cohort)] += messages.double()
        wanted[list(cohort)] += v.double()
    return sent, wanted


def owed(memory, name):
    return torch.stack([memory.get((name, "residual", c), torch.zeros(D)).double() for c in range(CLIENTS)])


COHORTS = [(0, 1, 2, 3), (1, 3), (3, 0), (2, 1, 0), (3,)]


@pytest.mark.parametrize("defense", FEEDBACK, ids=label)
def test_what_was_sent_and_what_is_owed_add_up_to_all_rows(defense):
    memory = {}
    sent, wanted = played(DefenseStack([defense]), COHORTS, memory)
    residual = owed(memory, defense.name)
    torch.testing.assert_close(sent + residual, wanted, rtol=0, atol=1e-5)
    assert (vector_norm(residual, dim=1) > 1).all()
    assert set(memory) == {(defense.name, "residual", c) for c in range(CLIENTS)}


@pytest.mark.parametrize("defense", FEEDBACK, ids=label)
def test_who_skips_a_round_keeps_its_residual(defense):
    stack, memory = DefenseStack([defense]), {}
    v = rows(11)
    stack.clients(v, context(1, memory=memory))
    kept = {key: value.clone() for key, value in memory.items()}
    stack.clients(v[1:2], context(2, (1,), memory))
    for (name, what, c), value in memory.items():
        assert torch.equal(value, kept[name, what, c]) == (c != 1)
    third = stack.clients(torch.zeros(1, D), context(3, (2,), memory))
    fresh = stack.clients(kept[defense.name, "residual", 2][None], context(3, (2,), {}))
    assert torch.equal(third, fresh), "what is owed is sent as if it were a row"
    assert third.count_nonzero() > 0


@pytest.mark.parametrize("defense", FEEDBACK, ids=label)
def test_a_defense_listed_twice_keeps_two_residuals_apart(defense):
    """The second may owe only what the first sent and it did not."""
    stack, memory = DefenseStack([defense, Clip(1e6), defense]), {}
    sent, wanted = played(stack, COHORTS, memory)
    first, second = owed(memory, defense.name), owed(memory, f"{defense.name}#2")
    assert len(memory) == 2 * CLIENTS
    assert not torch.allclose(first, second)
    torch.testing.assert_close(sent + first + second, wanted, rtol=0, atol=1e-5)
    alone = {}
    played(DefenseStack([defense]), COHORTS, alone)
    assert torch.equal(first, owed(alone, defense.name)) or isinstance(defense, RandK)


@pytest.mark.parametrize("defense", FEEDBACK, ids=label)
def test_remembered_rows_are_their_own_and_follow_the_rows(defense):
    """A view of the cohort's matrix would put all of it into every checkpoint, once a client."""
    memory = {}
    v = rows(12)
    defense.clients(v, context(memory=memory))
    assert all(m.untyped_storage().nbytes() == 4 * D for m in memory.values())
    sent = defense.clients(v.double(), context(2, memory=memory))
    assert sent.dtype == torch.float64


@pytest.mark.parametrize("defense", [d for d in FORGETFUL if not isinstance(d, Subspace | Prune)], ids=label)
def test_without_feedback_nothing_is_remembered(defense):
    memory = {}
    first = defense.clients(rows(), context(memory=memory))
    assert memory == {}
    assert torch.equal(first, defense.clients(rows(), context(memory=memory)))


def test_feedback_sends_everything_in_the_end():
    """Of one row and then nothing but zeros, top-k with k = D / 10 has sent all after ten rounds."""
    memory, v = {}, rows(13)
    sent = TopK(0.1).clients(v, context(memory=memory))
    for number in range(2, 11):
        sent = sent + TopK(0.1).clients(torch.zeros_like(v), context(number, memory=memory))
    torch.testing.assert_close(sent, v)


# What attacks make of them


def attacked(defense, distance=cosine):
    """The true gradient, what the server sees of it, and the distance an adapted attack takes."""
    model, data = tiny_model(), tiny_examples(4)
    gradient = plain_gradient(model, data)
    layout = Layout.of(model)
    local = Local(model, layout.row(model), cross_entropy, layout)
    stack = DefenseStack([defense])
    (message,) = stack.clients(-gradient[None], context(clients=(0,), local=local))
    seen = observe(model, data, update=message, defenses=stack.public(), round=1, local=LocalSpec())
    return gradient, seen, adapt(seen, distance, 0.1)


@pytest.mark.parametrize("defense", [TopK(0.2), RandK(0.2), RandK(0.2, False), Prune(0.8)], ids=label)
def test_attacks_match_only_what_was_sent(defense):
    for distance in (cosine, relative):
        gradient, seen, adapted = attacked(defense, distance)
        assert adapted.distance == Masked(distance)
        assert "coordinates that" in adapted.about
        assert float(adapted.distance(gradient[None].clone(), seen.gradient[None])) < 1e-10
        assert float(distance(gradient[None].clone(), seen.gradient[None])) > 0.01


def test_attacks_that_are_blind_to_scale_match_unbiased_randk():
    gradient, seen, adapted = attacked(RandK(0.2, False, unbiased=True))
    assert float(adapted.distance(gradient[None].clone(), seen.gradient[None])) < 1e-10


@pytest.mark.parametrize("defense", [Sign(), Sign("none", 0.01, error_feedback=False)], ids=label)
def test_attacks_match_signs(defense):
    gradient, seen, adapted = attacked(defense)
    assert adapted.distance == Signs()
    assert torch.equal(seen.gradient.sign(), gradient.sign())
    right = float(adapted.distance(gradient[None].clone(), seen.gradient[None]))
    shuffled = gradient[torch.randperm(len(gradient), generator=torch.Generator().manual_seed(0))]
    assert right < 0.75 < float(adapted.distance(shuffled[None].clone(), seen.gradient[None]))
