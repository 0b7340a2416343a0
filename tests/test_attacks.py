"""Every attack keeps its contract: one row here an attack."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model

from fltoolkit import registry
from fltoolkit.errors import InputError

ATTACKS = {
    "difference": "difference:inner=idlg,steps=150",
    "disaggregation": "disaggregation:inner=idlg,steps=150",
    "dlfa": "dlfa:steps=150,restarts=2",
    "dlg": "dlg:steps=150",
    "features": "features:steps=60",
    "generative": "generative:steps=20,training=20",
    "idlg": "idlg:steps=150",
    "gradinversion": "gradinversion:steps=150,restarts=2",
    "inconsistency": "inconsistency:steps=150",
    "inverting": "inverting:steps=150",
    "isolation": "isolation:steps=150",
    "learned": "learned:steps=30,simulations=64,hidden=16",
    "natural": "natural:steps=150",
    "sme": "sme:steps=150",
}
SEARCHES = ["dlfa:tv=0", "dlg", "gradinversion:tv=0,l2=0", "idlg", "inverting:tv=0", "natural", "sme:tv=0"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def copies(observation):
    return {
        f.name: getattr(observation, f.name).clone()
        for f in dataclasses.fields(observation)
        if isinstance(getattr(observation, f.name), torch.Tensor)
    }


def test_the_table_covers_every_attack():
    assert sorted(ATTACKS) == registry.attack_names()


@pytest.mark.parametrize("name", ATTACKS)
def test_contract(name):
    """Shapes of the batch, labels in range, the observation untouched, equal seeds equal numbers."""
    side = 8 if name == "generative" else 5
    attack, model = registry.make_attack(ATTACKS[name]), tiny_model(side=side)
    seen = observe(model, tiny_examples(2, side=side), auxiliary=tiny_examples(40, 9, side=side))
    before, weights = copies(seen), [p.clone() for p in model.parameters()]
    found = attack(seen, seeded())
    assert found.x.shape == (2, 1, side, side)
    assert found.y.shape == (2,)
    assert found.y.min() >= 0
    assert found.y.max() < 4
    assert found.iterations > 0
    assert found.evaluations >= found.iterations
    assert len(found.trace) == found.iterations + 1
    assert found.note
    assert all(torch.equal(v, getattr(seen, k)) for k, v in before.items())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(found.x, attack(seen, seeded()).x)
    assert not torch.equal(found.x, attack(seen, seeded(1)).x)


@pytest.mark.parametrize("name", SEARCHES)
def test_one_example_comes_back(name):
    model, data = tiny_model(), tiny_examples(1)
    found = registry.make_attack(name)(observe(model, data), seeded())
    assert found.y.tolist() == data.y.tolist()
    assert (found.x - data.x).abs().max() < 0.05


@pytest.mark.parametrize("name", ATTACKS)
def test_options_and_unknown_ones(name):
    assert registry.make_attack(f"{name}:steps=7").steps == 7
    assert registry.make_attack(name, steps=7).steps == 7
    if hasattr(registry.attack_class(name)(), "restarts"):
        assert registry.make_attack(name, restarts=2).restarts == 2
    else:
        with pytest.raises(InputError, match=f"unknown option of attack {name} 'restarts'"):
            registry.make_attack(name, restarts=2)
    assert registry.make_attack(name, steps=None).steps == registry.attack_class(name)().steps
    with pytest.raises(InputError, match=f"unknown option of attack {name} 'stops'"):
        registry.make_attack(f"{name}:stops=7")


@pytest.mark.parametrize(
    "spec", ["inverting:tv=nan", "inverting:lr=inf", "sme:tv=inf", "idlg:tolerance=inf", "dlfa:lr=-inf"]
)
def test_options_that_no_report_can_hold_are_refused(spec):
    name, key = spec.split("=")[0].split(":")
    with pytest.raises(InputError, match=f"{name}:{key} must be finite|{key} must be"):
        registry.make_attack(spec)


def test_third_parties_add_attacks_by_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint("theirs", "attacks.idlg:IDLG", "fltoolkit.attacks")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group.endswith("attacks") else [])
    assert registry.attack_names() == sorted([*ATTACKS, "theirs"])
    assert registry.make_attack("theirs:steps=3").steps == 3
    with pytest.raises(InputError, match=r"unknown attack 'others'.*known: .*theirs"):
        registry.make_attack("others")
