"""The search for natural images, and the prior that fades while it goes on."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model

from attacks.natural import Natural
from fltoolkit import registry
from fltoolkit.audit import Scene, Stage
from fltoolkit.data import Dataset
from fltoolkit.data.photos import three_photographs
from fltoolkit.inversion.fading import Fading
from fltoolkit.types import Examples, LocalSpec

CENTRE = torch.tensor([1.0, 2.0, -1.0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Bowl:
    """Misfit Σ steep (z − CENTRE)² + floor of each row; the penalty is Σ steep z², first with weight 1: the
    best z is CENTRE / (1 + w)."""

    def __init__(self, floor, steep):
        self.floor, self.steep = torch.tensor(floor), steep
        self.objective = SimpleNamespace(fading=(1.0, lambda x, *_: (steep * x.square()).sum(1)))
        self.owner, self.params = torch.zeros(len(floor), dtype=torch.long), torch.zeros(1, 1)

    def decode(self, z, rows):
        return z, rows

    def __call__(self, z, rows):
        apart = z - CENTRE
        return (self.steep * apart.square()).sum(1) + self.floor[rows], 2 * self.steep * apart


def fading(floor, every=10, steep=1):
    start = torch.zeros(len(floor), 3)
    return Fading(Bowl(floor, steep), start, fade=0.1, stages=3, every=every, history=5)


def run(search, steps):
    for _ in range(steps):
        search.step()
    return search.z / CENTRE


def test_the_weight_falls_while_the_misfit_is_smaller_than_the_penalty():
    """Rows that find no descent, as at the bottom of a bowl, go on to their next stage by themselves."""
    search = fading([0.0, 100.0], every=1000)
    search.weight *= 0.5  # the first misfit is below the penalty then
    shares = run(search, 30)
    assert torch.allclose(shares[0], torch.tensor(1 / 1.005), atol=1e-4)
    assert torch.allclose(shares[1], torch.tensor(1 / 1.5), atol=1e-4)
    assert search.weight.tolist() == pytest.approx([0.005, 0.5])
    assert search.settled.all()
    value = (CENTRE * (shares[0] - 1)).square().sum() + 0.005 * (CENTRE * shares[0]).square().sum()
    assert float(search.loss[0]) == pytest.approx(float(value), rel=1e-3)


def test_a_stage_lasts_so_many_iterations_or_until_it_is_hastened():
    search = fading([0.0, 0.0], every=4, steep=torch.tensor([1.0, 30.0, 1000.0]))
    search.weight *= 0.5
    seen = []
    for step in range(12):
        search.hasten(torch.tensor([False, step == 2]))
        search.step()
        seen.append(search.stage.tolist())
    first, second = ([row[i] for row in seen] for i in (0, 1))
    assert first == 4 * [0] + 4 * [1] + 4 * [2]
    assert second == 2 * [0] + 4 * [1] + 6 * [2]


def test_a_stage_begins_as_a_search_does():
    """With the value and the slope under the new weight, and a step down that slope."""
    search = fading([0.0], every=1000, steep=torch.tensor([1.0, 30.0, 1000.0]))
    search.weight *= 0.5
    run(search, 4)
    search.hasten(torch.tensor([True]))
    start, gradient = search.z.clone(), search.gradient.clone()
    apart, w = start - CENTRE, 0.05
    assert torch.allclose(gradient, 2 * search.problem.steep * (apart + w * start), rtol=1e-4)
    value = (search.problem.steep * (apart.square() + w * start.square())).sum()
    assert float(search.loss[0]) == pytest.approx(float(value), rel=1e-5)
    search.step()
    assert torch.cosine_similarity(search.z - start, -gradient).item() == pytest.approx(1, abs=1e-5)


def test_rows_that_are_left_keep_their_own_weights():
    search = fading([0.0, 100.0, 0.0])
    search.weight *= 0.5
    run(search, 2)
    search.keep(torch.tensor([1, 2]))
    shares = run(search, 36)[:, 0].tolist()
    assert shares == pytest.approx([1 / 1.5, 1 / 1.005], abs=1e-4)


def test_a_search_that_is_taken_up_again_gives_the_same_numbers():
    straight, first = fading([0.0, 0.1]), fading([0.0, 0.1])
    run(straight, 25)
    run(first, 12)
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.state().items()}
    second = fading([0.0, 0.1])
    second.restore(kept)
    assert run(second, 13).equal(straight.z / CENTRE)
    assert second.loss.equal(straight.loss)


def photographs(count, local, seed=0):
    data = Dataset("photographs", Examples(three_photographs(count), torch.arange(count)), None, 100)
    stage = Stage(Scene(data=data, model="lenet", batch=count, local=local, seed=seed))
    transcript, public = stage.round(0)
    return stage.threat.observe(transcript, 0, public), transcript.truth[0]


def psnr(found, truth):
    order = [int((found.y == c).nonzero()[0, 0]) for c in truth.y]
    return float(-10 * (found.x.clamp(0, 1)[order] - truth.x).square().mean((1, 2, 3)).log10().mean())


def test_a_batch_of_photographs_comes_back_better_than_by_the_papers_searches():
    seen, truth = photographs(4, LocalSpec(1, None, 0.1))
    specs = ("natural:restarts=1,steps=100", "inverting:steps=100", "idlg:restarts=1,steps=100")
    ours, *theirs = (psnr(registry.make_attack(s)(seen, seeded()), truth) for s in specs)
    assert ours > 19
    assert ours > max(theirs) + 4


def test_of_several_orders_the_clients_own_explains_its_update():
    """Three steps of one photograph each at a rate where the order counts."""
    seen, truth = photographs(3, LocalSpec(1, 1, 0.1))
    one, several = (
        registry.make_attack(f"natural:steps=60,restarts=1,orders={n}")(seen, seeded(2)) for n in (1, 6)
    )
    assert psnr(several, truth) > psnr(one, truth) + 3
    losses = several.restart_losses.sort().values
    assert len(losses) == 6
    assert losses[0] < losses[1] / 4


def test_of_plausible_labels_the_right_ones_explain_the_update(monkeypatch):
    seen, truth = photographs(3, LocalSpec(1, None, 0.1))
    guesses = torch.tensor([[0, 1, 3], [0, 1, 1], [0, 1, 2]])
    monkeypatch.setattr("attacks.natural.hypotheses", lambda name, o, most: guesses[:most])
    attack = registry.make_attack("natural:steps=60,restarts=1")
    found = attack(seen, seeded())
    assert found.y.tolist() == [0, 1, 2]
    assert len(found.restart_losses) == 3
    assert replace(attack, hypotheses=2)(seen, seeded()).y.tolist() != [0, 1, 2]
    told = attack(replace(seen, labels=truth.y), seeded())
    assert sorted(told.y.tolist()) == [0, 1, 2]
    assert len(told.restart_losses) == 1


def test_every_start_has_its_labels(monkeypatch):
    guesses = torch.tensor([[0, 1], [0, 2], [1, 1]])
    monkeypatch.setattr("attacks.natural.hypotheses", lambda name, o, most: guesses)
    seen = observe(tiny_model(), tiny_examples(2), local=LocalSpec(1, 1, 0.1))
    rows = Natural(restarts=7).label_rows(seen, torch.tensor([0, 1]), seeded())
    assert [sorted(r) for r in rows.tolist()] == [guesses[i % 3].tolist() for i in range(7)]
    assert {tuple(r) for r in rows[[0, 3, 6]].tolist()} == {(0, 1), (1, 0)}
    for told in ([0, 1], [1, 0]):
        rows = Natural(restarts=1).label_rows(replace(seen, labels=torch.tensor(told)), rows[0], seeded())
        assert rows.tolist() == [told]


def test_orders_are_tried_only_where_there_are_batches():
    model, data = tiny_model(), tiny_examples(2)
    counts = []
    for local in (LocalSpec(2, None, 0.1), LocalSpec(1, 1, 0.1)):
        found = Natural(steps=2, restarts=2, orders=5)(observe(model, data, local=local), seeded())
        counts.append(len(found.restart_losses))
    assert counts == [2, 5]


def test_beside_a_likelihood_the_prior_does_not_fade(monkeypatch):
    stages = []

    class Watched(Fading):
        def __init__(self, problem, z, fade, count, *rest):
            stages.append(count)
            super().__init__(problem, z, fade, count, *rest)

    monkeypatch.setattr("attacks.natural.Fading", Watched)
    seen = observe(tiny_model(), tiny_examples(1))
    noise = {"name": "gaussian", "noise_multiplier": 2.0, "placement": "client"}
    for o in (seen, replace(seen, defenses=({"name": "clip", "norm": 1.0}, noise))):
        Natural(steps=2)(o, seeded())
    assert stages == [4, 1]
