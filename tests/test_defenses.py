"""Every defense keeps its contract; clip and gaussian keep their guarantees."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from conftest import protect
from torch.linalg import vector_norm

from defenses.clip import Clip
from defenses.gaussian import Gaussian
from defenses.secagg import SecAgg
from fltoolkit import registry
from fltoolkit.defense import DefenseStack, RoundContext
from fltoolkit.errors import InputError

CLIENTS, D = 4, 200

STACKS = {
    "clip": [Clip(norm=0.5)],
    "gaussian": [Clip(norm=0.5), Gaussian(noise_multiplier=0.1)],
    "secagg": [SecAgg(cohort=CLIENTS)],
}


def context(number=1, seed=5, clients=CLIENTS):
    return RoundContext(seed, number, tuple(range(clients)), torch.full((clients,), 1 / clients))


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
        ("clip:nrom=1", r"unknown option of defense clip 'nrom'; did you mean 'norm'\? \(known: norm\)"),
        ("clip:0.5", "must look like name:key=value"),
        ("gaussian:noise_multiplier=-1", r"noise_multiplier must be a finite number >= 0, got -1\.0"),
        ("gaussian:placement=cloud", r"placement must be one of \('client', 'server'\), got 'cloud'"),
        ("klip", r"unknown defense 'klip'; did you mean 'clip'\? \(known: clip, gaussian, secagg\)"),
    ],
)
def test_impossible_defenses_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        registry.make_defense(spec)


def test_defenses_are_parsed_with_their_types():
    assert registry.make_defense("clip:norm=2") == Clip(norm=2.0)
    assert registry.make_defense("gaussian:noise_multiplier=0.5,placement=client") == Gaussian(0.5, "client")
    assert registry.make_defense("secagg:clients=4") == SecAgg(cohort=4)
