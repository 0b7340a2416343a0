"""Every defense keeps its contract; clips and gaussian keep their guarantees."""

from __future__ import annotations

from dataclasses import replace
from math import inf, sqrt

import numpy as np
import pytest
import torch
from conftest import protect, tiny_examples, tiny_model
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SampledWithoutReplacementDpEvent
from torch.linalg import vector_norm

from defenses.adaptive_clip import AdaptiveClip
from defenses.clip import Clip
from defenses.clip_layers import ClipLayers
from defenses.correlated import Correlated
from defenses.discrete_gaussian import DiscreteGaussian
from defenses.gaussian import Gaussian
from defenses.instahide import InstaHide
from defenses.lightsecagg import LightSecAgg
from defenses.mixup import Mixup
from defenses.mpc import MPC
from defenses.normalise import Normalise
from defenses.precode import Precode
from defenses.prune import Prune
from defenses.quantise import Quantise
from defenses.randk import RandK
from defenses.secagg import SecAgg
from defenses.sign import Sign
from defenses.skellam import Skellam
from defenses.soft_clip import SoftClip
from defenses.soteria import Soteria
from defenses.subspace import Subspace
from defenses.topk import TopK
from fltoolkit import registry
from fltoolkit.accounting import epsilon_by_view, gaussian_epsilon
from fltoolkit.defense import DefenseStack, Local, RoundContext, Sampling
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.training.task import Task, round_events
from fltoolkit.types import Layout, LocalSpec

CLIENTS = 4
MODEL = tiny_model()
LAYOUT = Layout.of(MODEL)
D = LAYOUT.size

STACKS = {
    "adaptive-clip": [AdaptiveClip(norm=0.5)],
    "clip": [Clip(norm=0.5)],
    "clip-layers": [ClipLayers(norm=0.5)],
    "correlated": [Clip(norm=0.5), Correlated(rounds=4)],
    "discrete-gaussian": [Clip(norm=0.5), DiscreteGaussian()],
    "gaussian": [Clip(norm=0.5), Gaussian(noise_multiplier=0.1)],
    "instahide": [InstaHide(k=2)],
    "lightsecagg": [LightSecAgg(cohort=CLIENTS)],
    "mixup": [Mixup()],
    "mpc": [MPC(cohort=CLIENTS)],
    "normalise": [Normalise()],
    "precode": [Precode(size=5)],
    "prune": [Prune()],
    "quantise": [Quantise()],
    "randk": [RandK()],
    "secagg": [SecAgg(cohort=CLIENTS)],
    "sign": [Sign()],
    "skellam": [Clip(norm=0.5), Skellam()],
    "soft-clip": [SoftClip(norm=0.5)],
    "soteria": [Soteria(ratio=0.25, layer="3")],
    "subspace": [Subspace()],
    "topk": [TopK()],
}


def context(number=1, seed=5, clients=CLIENTS, **changes):
    data = {c: tiny_examples(3, seed=c) for c in range(clients)}
    local = Local(MODEL, LAYOUT.row(MODEL), cross_entropy, LAYOUT, data)
    weights = torch.full((clients,), 1 / max(1, clients))
    return RoundContext(seed, number, tuple(range(clients)), weights, local=local, **changes)


def rows(scale=1.0):
    return scale * torch.randn(CLIENTS, D, generator=torch.Generator().manual_seed(0))


def test_the_table_covers_every_defense():
    assert sorted(STACKS) == registry.defense_names()


@pytest.mark.parametrize("name", STACKS)
def test_contract(name):
    """Same type in and out, arguments untouched, a repeat gives the same aggregate, parameters are public."""
    stack, before = DefenseStack(STACKS[name], CLIENTS), rows()
    given = before.clone()
    done = protect(stack, given, context())
    assert torch.equal(given, before)
    assert done.aggregate.shape == (D,)
    assert done.aggregate.dtype == before.dtype
    assert len(done.messages) == CLIENTS
    assert torch.equal(done.aggregate, protect(stack, before, context()).aggregate)
    assert stack.public()[-1]["name"] == name
    assert registry.defense_class(name).__doc__


@pytest.mark.parametrize("name", STACKS)
def test_nobody_in_a_poisson_cohort(name):
    """The server releases noise or nothing, and what noise costs is counted."""
    stack = DefenseStack(STACKS[name])
    ctx = context(clients=0, sampling=Sampling("poisson", 0.1, 30))
    done = protect(stack, rows()[:0], ctx)
    assert len(done.messages) == 0
    assert done.aggregate.shape == (D,)
    assert done.aggregate.isfinite().all()
    noise_at_client = Gaussian(noise_multiplier=1.0, placement="client")
    assert (
        epsilon_by_view([DefenseStack([Clip(1.0), noise_at_client]).events(ctx)], False, 1e-5)["message"] == 0
    )


def test_a_private_norm_does_not_protect_the_update():
    """The events of adaptive clipping are about its quantile; the mean is released beside it."""
    adaptive, noise = AdaptiveClip(norm=0.5, bit_noise=1.0), Gaussian(noise_multiplier=1.0)
    ctx = context(sampling=Sampling("poisson", 0.1, 40))

    def spent(*defenses):
        return epsilon_by_view([DefenseStack(list(defenses)).events(ctx)], False, 1e-5)["aggregate"]

    assert spent(adaptive) == inf
    assert spent(Clip(0.5), noise) < spent(adaptive, noise) < inf


def test_what_looks_at_data_after_noise_has_no_epsilon():
    """Which columns Soteria zeroes depends on the examples, so it must come before the noise of a message."""
    noise = [Clip(0.5), Gaussian(noise_multiplier=1.0, placement="client")]
    soteria = STACKS["soteria"]

    def spent(*defenses):
        return epsilon_by_view([DefenseStack(list(defenses)).events(context())], False, 1e-5)

    assert spent(*noise, *soteria) == {"message": inf, "aggregate": inf}
    before = spent(*soteria, *noise)
    assert before == spent(*noise)
    assert max(before.values()) < inf
    assert spent(*noise, TopK(error_feedback=False))["message"] == before["message"], "of the noisy row alone"


@pytest.mark.parametrize("name", ["mixup", "instahide", "soteria", None])
def test_single_examples_have_no_epsilon_where_more_than_their_gradients_shows(name):
    """One example is in several mixtures, and in Soteria's choice of columns."""
    private = [Clip(0.5, level="example"), Gaussian(noise_multiplier=1.0, level="example")]
    stack = DefenseStack([*(STACKS[name] if name else []), *private])
    task = Task(MODEL, cross_entropy, LocalSpec(1, 2, 0.1), stack, 0)
    events = round_events(task, context(), [3] * CLIENTS)
    found = epsilon_by_view([events], False, 1e-5, "example")["message"]
    assert found == inf if name else found < inf


@pytest.mark.parametrize("norm", [1e-6, 0.5, 3.0, 1e6])
def test_clip_norm_is_at_most_the_bound_and_short_rows_are_kept(norm):
    big, small = rows(10.0), rows(1e-9)
    clipped = Clip(norm=norm).clients(big, context())
    assert (vector_norm(clipped.double(), dim=1) <= norm * (1 + 1e-6)).all()
    long = vector_norm(big, dim=1) > norm
    cosine = torch.cosine_similarity(clipped, big, dim=1)
    assert (cosine > 1 - 1e-6).all()
    assert torch.equal(clipped[~long], big[~long])
    assert torch.equal(Clip(norm=norm).clients(small, context()), small)


@pytest.mark.parametrize("shares", ["equal", "size"])
def test_clip_layers_bounds_every_tensor_and_the_whole(shares):
    defense = ClipLayers(norm=0.7, shares=shares)
    bounds = defense.bounds(LAYOUT.sizes)
    assert sum(c * c for c in bounds) == pytest.approx(0.49)
    big = rows(10.0)
    clipped = defense.clients(big, context())
    parts = zip(clipped.split(LAYOUT.sizes, 1), big.split(LAYOUT.sizes, 1), bounds, strict=True)
    for after, before, c in parts:
        assert (vector_norm(after.double(), dim=1) <= c * (1 + 1e-6)).all()
        assert (torch.cosine_similarity(after, before, dim=1) > 1 - 1e-6).all()
    assert (vector_norm(clipped.double(), dim=1) <= 0.7 * (1 + 1e-6)).all()
    small = rows(1e-9)
    assert torch.equal(defense.clients(small, context()), small)
    with pytest.raises(InputError, match="clip-layers must know the model's layers"):
        defense.clients(big, RoundContext(0, 1, (0,), torch.ones(1)))


def test_soft_clip_stays_below_its_norm_and_keeps_the_order_of_lengths():
    lengths = torch.logspace(-3, 4, CLIENTS)
    given = torch.nn.functional.normalize(rows(), dim=1) * lengths[:, None]
    done = SoftClip(norm=0.5).clients(given, context())
    got = vector_norm(done.double(), dim=1)
    expected = lengths.double() / (1 + (lengths.double() / 0.5) ** 2).sqrt()
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert (got <= 0.5 * (1 + 1e-6)).all()
    assert got.tolist() == sorted(got.tolist())
    assert SoftClip(norm=0.5).bound(0.5) == pytest.approx(0.5 / sqrt(2))
    assert SoftClip(norm=0.5).bound(None) == 0.5


def test_normalise_gives_every_row_its_length():
    given = rows()
    given[1] = 0
    done = Normalise(norm=2.0).clients(given, context())
    assert vector_norm(done, dim=1).tolist() == pytest.approx([2.0, 0.0, 2.0, 2.0], rel=1e-5)
    damped = Normalise(norm=2.0, gamma=3.0).clients(given, context())
    lengths = vector_norm(given, dim=1)
    assert vector_norm(damped, dim=1).tolist() == pytest.approx(
        (2 * lengths / (lengths + 3)).tolist(), rel=1e-5
    )


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_adaptive_clip_finds_the_quantile(quantile):
    """Norms of 1,000 clients are uniform on (0, 10): C settles at 10 · quantile, here within 5 %."""
    generator = np.random.default_rng(0)
    stack = DefenseStack([AdaptiveClip(norm=1.0, quantile=quantile, bit_noise=10.0)])
    memory: dict = {}
    for number in range(1, 151):
        given = torch.from_numpy(generator.uniform(0, 10, (1000, 1))).float()
        protect(stack, given, context(number, clients=1000, memory=memory))
    assert float(memory[("adaptive-clip", "norm")]) == pytest.approx(10 * quantile, rel=0.05)


def test_adaptive_clip_moves_by_the_paper_s_rule_whatever_the_chunks():
    given, quiet = rows(), AdaptiveClip(norm=19.0, quantile=0.5, rate=0.3, bit_noise=0.0)
    stack, memory = DefenseStack([quiet]), {}
    ctx = context(memory=memory)
    stack.clients(given[:3], replace(ctx, clients=ctx.clients[:3]))
    stack.clients(given[3:], replace(ctx, clients=ctx.clients[3:]))
    stack.server(given.mean(0), ctx)
    below = float((vector_norm(given, dim=1) <= 19.0).float().mean())
    assert 0 < below < 1
    assert float(memory[("adaptive-clip", "norm")]) == pytest.approx(19 * np.exp(-0.3 * (below - 0.5)))


def test_noise_follows_the_norm_that_a_clip_adapted_to():
    stack = DefenseStack([AdaptiveClip(norm=1.0), Gaussian(noise_multiplier=1.0)])
    memory = {("adaptive-clip", "norm"): torch.tensor(5.0)}
    wide, zero = torch.zeros(CLIENTS, 50_000), torch.zeros(CLIENTS, 50_000)
    noisy = protect(stack, wide, context(memory=memory)).aggregate
    assert noisy.std().item() == pytest.approx(5 / CLIENTS, rel=0.02)
    assert protect(stack, zero, context()).aggregate.std().item() == pytest.approx(1 / CLIENTS, rel=0.02)


def test_adaptive_clip_composes_with_noise_as_the_paper_splits_it():
    """z of both together is (z_Δ⁻² + (2 σ_b)⁻²)^(−1/2), Theorem 1, and that is what sampling amplifies."""
    for bits, sigma in ((0.5, 1.0), (3.0, 2.0)):
        stack = DefenseStack([AdaptiveClip(bit_noise=bits), Gaussian(noise_multiplier=sigma)])
        z = (sigma**-2 + (2 * bits) ** -2) ** -0.5
        for how, told in (
            (Sampling(), {"sampling_rate": 1.0}),
            (Sampling("poisson", 0.01, 400), {"sampling_rate": 0.01}),
            (
                Sampling("fixed", 0.01, 400),
                {"sampling_rate": 0.01, "sampling": "fixed", "population": 400, "adjacency": "zero-out"},
            ),
        ):
            spent = epsilon_by_view([stack.events(context(sampling=how))] * 3, False, 1e-5)
            expected = gaussian_epsilon(z, told.pop("sampling_rate"), 3, 1e-5, **told)
            assert spent["aggregate"] == pytest.approx(expected, rel=1e-4)
            assert spent["message"] == inf


@pytest.mark.parametrize("how", [Sampling(), Sampling("poisson", 0.01, 400), Sampling("fixed", 0.01, 400)])
def test_bits_beside_noise_of_clients_amplify_nothing(how):
    """Who sees the clients' own noise alone may know the sample."""
    stack = DefenseStack([AdaptiveClip(bit_noise=3.0), Gaussian(noise_multiplier=2.0, placement="client")])
    spent = epsilon_by_view([stack.events(context(sampling=how))], False, 1e-5)
    summed = 2 * CLIENTS**0.5
    assert spent["aggregate"] == pytest.approx(
        gaussian_epsilon((summed**-2 + 6.0**-2) ** -0.5, 1, 1, 1e-5), rel=1e-4
    )
    assert spent["message"] == inf


def test_bits_without_noise_protect_nothing():
    for last in (Gaussian(), Gaussian(placement="client")):
        events = DefenseStack([AdaptiveClip(bit_noise=0.0), last]).events(context())
        assert set(epsilon_by_view([events], False, 1e-5).values()) == {inf}
        assert set(epsilon_by_view([events], True, 1e-5).values()) == {inf}


def test_bits_count_of_those_in_the_sum_alone():
    """Two of four below C leave C as it is; those who dropped out, or were given up, say nothing."""
    given = torch.tensor([[1.0], [9.0], [1.0], [9.0]])
    stack, memory = DefenseStack([AdaptiveClip(norm=5.0, bit_noise=0.0)]), {}
    stack.clients(given, context(1, memory=memory))  # and no sum
    stack.clients(given, context(2, memory=memory))
    stack.server(given.mean(0), replace(context(2, memory=memory), clients=(1, 2)))
    assert float(memory[("adaptive-clip", "norm")]) == pytest.approx(5.0)
    stack.clients(given, context(3, memory=memory))
    stack.server(given.mean(0), replace(context(3, memory=memory), clients=(1, 3)))
    assert float(memory[("adaptive-clip", "norm")]) == pytest.approx(5 * np.exp(0.2 * 0.5))


@pytest.mark.parametrize(
    ("later", "length"),
    [
        (Sign(scale="none", error_feedback=False), "of any length"),
        (RandK(fraction=0.1, unbiased=True, error_feedback=False), "up to 15 long"),
        (Normalise(norm=100.0), "up to 100 long"),
        (Quantise(levels=4, bucket=16), "up to 2 long"),
        (TopK(error_feedback=True), "of any length"),
    ],
)
@pytest.mark.parametrize("noise", [Gaussian(), Correlated(rounds=4)])
def test_rows_that_grow_after_noise_has_counted_on_them_are_refused(noise, later, length):
    """Noise goes on the sum, whatever is done to rows after it in the list."""
    with pytest.raises(
        InputError, match=f"{later.name} must come before {noise.name}.*: after.* they are {length}"
    ):
        DefenseStack([Clip(norm=1.0), noise, later])
    DefenseStack([Clip(norm=1.0), noise, Clip(norm=3.0), TopK(error_feedback=False)])


def test_a_cohort_of_unequal_weights_is_not_amplified():
    """Its noise follows the largest weight drawn, and tells of it."""
    stack = DefenseStack([Clip(), Gaussian(noise_multiplier=2.0)])
    plain = gaussian_epsilon(2.0, 1, 5, 1e-5)
    for alike in (True, False):
        how = Sampling("fixed", 0.01, 400, alike)
        spent = epsilon_by_view([stack.events(context(sampling=how))] * 5, False, 1e-5)["aggregate"]
        assert (spent == pytest.approx(plain, rel=1e-4)) == (not alike)
        assert alike == (spent < plain / 2)


@pytest.mark.parametrize(
    ("sampling", "kinds"),
    [
        (Sampling(), [(GaussianDpEvent, "zero-out")]),
        (Sampling("poisson", 0.1, 40), [(PoissonSampledDpEvent, "add-remove")]),
        (
            Sampling("fixed", 0.1, 40),
            [(GaussianDpEvent, "zero-out"), (SampledWithoutReplacementDpEvent, "replace-one")],
        ),
    ],
)
def test_events_say_how_the_cohort_was_sampled(sampling, kinds):
    stack = DefenseStack([Clip(), Gaussian()])
    events = stack.events(context(sampling=sampling))
    assert [(type(e.event), e.adjacency) for e in events] == kinds
    assert {(e.view, e.unit) for e in events} == {("aggregate", "client")}


def test_noise_on_a_poisson_cohort_counts_its_expected_size():
    zero = torch.zeros(CLIENTS, 50_000)
    ctx = context(sampling=Sampling("poisson", 0.25, 40))
    stack = DefenseStack([Clip(norm=0.5), Gaussian(noise_multiplier=2.0)])
    assert stack.server(zero.mean(0), ctx).std().item() == pytest.approx(2 * 0.5 / 10, rel=0.02)


def test_secure_noise_has_the_same_spread_and_does_not_repeat():
    zero = torch.zeros(CLIENTS, 50_000)
    stack = DefenseStack([Clip(norm=0.5), Gaussian(noise_multiplier=2.0, secure_rng=True)])
    one, two = (protect(stack, zero, context()).aggregate for _ in range(2))
    assert one.std().item() == pytest.approx(1 / CLIENTS, rel=0.02)
    assert not torch.equal(one, two)


def test_noise_without_a_clip_must_be_asked_for_by_name_and_promises_nothing():
    stack = DefenseStack([Gaussian(noise_multiplier=0.3, unbounded=True)])
    zero = torch.zeros(CLIENTS, 50_000)
    assert protect(stack, zero, context()).aggregate.std().item() == pytest.approx(0.3 / CLIENTS, rel=0.02)
    assert stack.events(context()) == ()


def test_a_clip_after_the_noise_leaves_the_sum_as_protected_as_a_message():
    """Four clients' noise adds up to twice one's where the rows are summed as they are."""
    local = [Clip(), Gaussian(placement="client")]
    for stack, expected in ((local, 2.0), ([*local, Clip()], 1.0)):
        events = {e.view: e.event.noise_multiplier for e in DefenseStack(stack).events(context())}
        assert events == {"message": 1.0, "sum": pytest.approx(expected)}


@pytest.mark.parametrize("placement", ["client", "server"])
def test_gaussian_has_the_stated_standard_deviation(placement):
    zero = torch.zeros(CLIENTS, 50_000)
    stack = DefenseStack([Clip(norm=0.5), Gaussian(noise_multiplier=2.0, placement=placement)])
    done = protect(stack, zero, context())
    one = 2.0 * 0.5
    spread = done.aggregate.std().item()
    if placement == "client":
        assert done.messages.std(dim=1).tolist() == pytest.approx([one] * CLIENTS, rel=0.02)
        assert spread == pytest.approx(one / sqrt(CLIENTS), rel=0.02)
        correlation = torch.corrcoef(done.messages) - torch.eye(CLIENTS)
        assert correlation.abs().max() < 0.03
    else:
        assert torch.equal(done.messages, zero)
        assert spread == pytest.approx(one / CLIENTS, rel=0.02)


def test_noise_differs_between_rounds_clients_seeds_and_repeats_of_a_defense():
    local = [Clip(norm=1.0), Gaussian(placement="client")]
    zero = torch.zeros(CLIENTS, D)
    base = protect(DefenseStack(local), zero, context()).messages
    assert not torch.equal(base, protect(DefenseStack(local), zero, context(number=2)).messages)
    assert not torch.equal(base, protect(DefenseStack(local), zero, context(seed=6)).messages)
    twice = DefenseStack([*local, Clip(norm=1.0), Gaussian(placement="client")])
    again = protect(twice, zero, context()).messages
    first = base * (1 / vector_norm(base, dim=1, keepdim=True).clamp_min(1.0))
    second = again - first
    assert (torch.cosine_similarity(second, base, dim=1).abs() < 0.5).all()


def test_a_defense_switched_on_leaves_the_noise_of_another_as_it_was():
    zero = torch.zeros(CLIENTS, D)
    one = DefenseStack([Clip(norm=1.0), Gaussian(placement="client")])
    two = DefenseStack([Clip(norm=2.0), Clip(norm=1.0), Gaussian(placement="client")])
    assert torch.equal(protect(one, zero, context()).messages, protect(two, zero, context()).messages)


def test_noise_without_a_clip_is_refused():
    with pytest.raises(InputError, match="gaussian must come after a clip"):
        DefenseStack([Gaussian()])
    with pytest.raises(InputError, match="gaussian must come after a clip"):
        DefenseStack([Clip(), Gaussian(placement="client"), Gaussian()])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip:norm=-1", r"norm must be a finite number > 0, got -1\.0"),
        ("clip:norm=0", "norm must be a finite number > 0"),
        ("clip:norm=nan", "norm must be a finite number > 0"),
        ("clip:norm=abc", "clip:norm must be of type float, got 'abc'"),
        (
            "clip:nrom=1",
            r"unknown option of defense clip 'nrom'; did you mean 'norm'\? \(known: level, norm\)",
        ),
        ("clip:0.5", "must look like name:key=value"),
        ("gaussian:noise_multiplier=-1", r"noise_multiplier must be a finite number >= 0, got -1\.0"),
        ("gaussian:placement=cloud", r"placement must be one of \('client', 'server'\), got 'cloud'"),
        ("klip", r"unknown defense 'klip'; did you mean 'clip'\? \(known: adaptive-clip, clip, "),
        ("soft-clip:norm=0", "norm must be a finite number > 0"),
        ("normalise:gamma=-1", "gamma must be a finite number >= 0"),
        ("clip-layers:shares=even", r"shares must be one of \('equal', 'size'\)"),
        ("adaptive-clip:quantile=2", "quantile must be between 0 and 1"),
        ("adaptive-clip:bit_noise=-1", "bit_noise must be a finite number >= 0"),
        ("gaussian:placement=client,level=example", "placement must be server at level example"),
        ("clip:level=layer", r"level must be one of \('client', 'example'\)"),
    ],
)
def test_impossible_defenses_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        registry.make_defense(spec)


def test_defenses_are_parsed_with_their_types():
    assert registry.make_defense("clip:norm=2") == Clip(norm=2.0)
    assert registry.make_defense("gaussian:noise_multiplier=0.5,placement=client") == Gaussian(0.5, "client")
    assert registry.make_defense("secagg:clients=4") == SecAgg(cohort=4)
