"""Attacks on updates of several local steps whose batch order is unknown."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model
from torch import nn

from attacks.dlfa import DLFA
from attacks.inverting import Inverting
from attacks.sme import SME
from fltoolkit import registry
from fltoolkit.audit import Scene, run
from fltoolkit.data import load
from fltoolkit.errors import InputError
from fltoolkit.inversion import epochs, recipe
from fltoolkit.inversion.distance import squared
from fltoolkit.inversion.matching import GradientMatching, Objective
from fltoolkit.inversion.surrogate import SurrogateMatching
from fltoolkit.loss import cross_entropy
from fltoolkit.metrics.image import match, psnr
from fltoolkit.rng import stream
from fltoolkit.training.engines import choose
from fltoolkit.types import Examples, Layout, LocalSpec

RECIPES = [LocalSpec(3, 2, 0.5), LocalSpec(2, 3, 0.3, momentum=0.9, weight_decay=0.01)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(model, data, local, orders):
    """w_u − w_0 of one client that meets `data` in the orders `[E, N]`, by a loop over `torch.optim.SGD`."""
    copy = deepcopy(model)
    sgd = torch.optim.SGD(copy.parameters(), local.lr, local.momentum, weight_decay=local.weight_decay)
    for order in orders:
        for index in order.split(local.batch or len(data)):
            sgd.zero_grad()
            nn.functional.cross_entropy(copy(data.x[index]), data.y[index]).backward()
            sgd.step()
    return Layout.of(model).row(copy) - Layout.of(model).row(model)


def orders_of(local, count, seed=3):
    rng = seeded(seed)
    return torch.stack([torch.randperm(count, generator=rng) for _ in range(local.epochs)])


@cache
def digits():
    return load("digits")


def digits_model(seed):
    """64-32-10, sigmoid."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.5, 0.5, generator=seeded(seed))
    return model


def victim(number, local, known=True):
    """What a server sees of client `number`, with 4 digits, trained by the engine; and the digits."""
    model, data = digits_model(number), digits()
    index = torch.from_numpy(stream(0, "v", number).permutation(len(data.train))[:4])
    private, row = data.train.take(index), Layout.of(model).row(model)
    train = choose(model, cross_entropy, data.input_shape, "auto")
    update = train(row, [private], local, [stream(0, "b", number)])[0]
    local = local if known else None
    return observe(model, private, update=update, num_classes=10, local=local, auxiliary=data.test), private


def mean_psnr(attack, victims):
    found = attack.many([o for o, _ in victims], [seeded() for _ in victims])
    return torch.stack(
        [psnr(f.x[match(f.x, d.x)], d.x, 1.0).mean() for f, (_, d) in zip(found, victims, strict=True)]
    ).mean()


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("local", RECIPES, ids=lambda r: f"E{r.epochs}B{r.batch}m{r.momentum}")
def test_the_true_epochs_have_distance_zero(local, one_by_one):
    model, data = tiny_model(), tiny_examples(5)
    orders = orders_of(local, 5)
    seen = observe(model, data, update=trained(model, data, local, orders), local=local)
    objective = Objective(squared, simulate=True, one_by_one=one_by_one)
    order, row = orders.flatten(), torch.tensor([0])
    problem = epochs.EpochMatching([seen], row, data.y[order][None], objective)
    x, y = problem.decode(data.x[order].flatten()[None], row)
    assert x.shape == (1, 5 * local.epochs, 1, 5, 5)
    assert y.shape == (1, 5 * local.epochs)
    assert problem(data.x[order].flatten()[None], row)[0].item() < 1e-10 * problem.scale.item()
    wrong = orders[[0] * local.epochs].flatten()
    other = epochs.EpochMatching([seen], row, data.y[wrong][None], objective)
    assert other(data.x[wrong].flatten()[None], row)[0].item() > 1e-6 * problem.scale.item()


def test_epochs_of_several_clients():
    model, data, local = tiny_model(), tiny_examples(8), LocalSpec(2, 2, 0.5)
    parts = [Examples(x, y) for x, y in zip(data.x.chunk(2), data.y.chunk(2), strict=True)]
    orders = [orders_of(local, 4, seed) for seed in (3, 8)]
    mean = torch.stack([trained(model, p, local, o) for p, o in zip(parts, orders, strict=True)]).mean(0)
    order = torch.cat([torch.cat([orders[0][e], 4 + orders[1][e]]) for e in range(2)])
    seen, row = observe(model, data, update=mean, local=local, clients=2), torch.tensor([0])
    problem = epochs.EpochMatching([seen], row, data.y[order][None], Objective(squared, simulate=True))
    assert problem(data.x[order].flatten()[None], row)[0].item() < 1e-10 * problem.scale.item()


def test_the_true_recipe_has_distance_zero():
    model, data, local = tiny_model(), tiny_examples(5), LocalSpec(3, 2, 0.5)
    orders = orders_of(local, 5)
    seen = observe(model, data, update=trained(model, data, local, orders), local=None)
    problem = recipe.RecipeMatching(seen, data.y, orders.flatten()[None], local)
    length = torch.tensor([[0.5 * 9]]).log()
    z = torch.cat([data.x.flatten()[None], length], 1)
    loss, gradient = problem(z, torch.tensor([0]))
    assert loss.item() < 1e-9
    step = torch.zeros_like(z)
    step[0, -1] = 0.1
    assert problem(z + step, torch.tensor([0]))[0].item() > 1e-4
    assert gradient.shape == z.shape


def test_one_epoch_of_one_batch_is_plain_matching():
    model, data = tiny_model(), tiny_examples(3)
    for local in (LocalSpec(1, None, 0.3), LocalSpec(4, None, 0.3), LocalSpec(4, 3, 0.3)):
        seen = observe(model, data, local=local)
        assert epochs.sets(seen) == 1
        row, z = torch.tensor([0]), torch.rand(1, 75)
        objective = Objective(squared, simulate=True)
        plain = GradientMatching([seen], row, data.y[None], objective)(z, row)
        torch.testing.assert_close(epochs.EpochMatching([seen], row, data.y[None], objective)(z, row), plain)


def test_order_does_not_matter_to_the_prior():
    x = torch.rand(2, 6, 1, 5, 5)
    other = x[:, torch.randperm(6)]
    other_data = torch.rand(2, 6, 1, 5, 5)
    for g in ("mean", "max"):
        for d in ("l2", "l1"):
            prior = epochs.EpochInvariance(3, g, d)
            same = torch.cat([x, other, x], 1)
            assert prior(same, x, x).abs().max() < 1e-10 if d == "l2" else prior(same, x, x).max() < 1e-6
            assert prior(torch.cat([x, other_data, x], 1), x, x).min() > 1e-3
    three = torch.rand(2, 18, 1, 5, 5)
    means = three.unflatten(1, (3, 6)).mean(2)
    pairs = [(means[:, a] - means[:, b]).square().flatten(1).mean(1) for a in range(3) for b in range(3)]
    torch.testing.assert_close(epochs.EpochInvariance(3)(three, x, x), torch.stack(pairs).mean(0))


def test_layered_distance_gives_its_derivative():
    layout = Layout.of(tiny_model())
    distance = epochs.Layered.falling(layout, torch.device("cpu"))
    first, last = distance.weights[0].item(), distance.weights[-1].item()
    assert (first, last) == (1.0, pytest.approx(0.36788, abs=1e-4))
    g, t = torch.randn(3, layout.size, requires_grad=True), torch.randn(3, layout.size)
    size = (distance.weights * t.square()).sum(1)
    plain = (distance.weights * (g - t).square()).sum(1) / size
    (slope,) = torch.autograd.grad(plain.sum(), g)
    work = g.detach().clone()
    torch.testing.assert_close(distance(work, t), plain.detach())
    torch.testing.assert_close(work, slope)


def test_assignments_are_distinct_and_keep_the_counts():
    labels = torch.tensor([3, 5, 5, 7])
    seen = observe(tiny_model(), tiny_examples(4), local=LocalSpec(2, 2, 0.1), num_classes=10)
    rows = epochs.assignments(labels, seen, 30, seeded(), 2)
    assert rows.shape == (30, 8)
    assert (rows.unflatten(1, (2, 4)).sort(2).values == labels).all()
    assert len({tuple(r.unflatten(0, (2, 2, 2)).sort(2).values.flatten().tolist()) for r in rows}) == 16
    whole = replace(seen, local=LocalSpec(2, None, 0.1))
    one = epochs.assignments(labels, whole, 3, seeded(), 1)
    assert one.tolist() == [labels.tolist()] * 3
    assert DLFA(restarts=30).label_rows(seen, labels, seeded()).equal(rows)


def test_epochs_are_matched_and_averaged():
    x, y = torch.rand(4, 1, 5, 5), torch.tensor([0, 0, 1, 2])
    order = torch.tensor([2, 1, 3, 0])
    noise = 0.01 * torch.randn(4, 1, 5, 5)
    joined, labels = epochs.combine(torch.cat([x, (x + noise)[order]]), torch.cat([y, y[order]]), 2)
    torch.testing.assert_close(joined, x + noise / 2)
    assert labels.equal(y)
    alike = torch.cat([torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1)])
    joined, _ = epochs.combine(alike, torch.tensor([0, 1, 1, 0]), 2)
    assert joined.flatten().tolist() == [0.5, 0.5]


def test_surrogate_at_its_ends_and_its_slope():
    torch.set_default_dtype(torch.float64)
    try:
        model, data = tiny_model().double(), tiny_examples(3)
        data, row = Examples(data.x.double(), data.y), torch.tensor([0])
        seen = observe(model, data, update=0.1 * torch.randn(Layout.of(model).size), local=None)
        problem = SurrogateMatching([seen], row, data.y[None])
        moved = replace(seen, params=seen.params + seen.update)
        z = torch.rand(1, 76)
        for alpha, there in ((1.0, seen), (0.0, moved)):
            z[0, -1] = alpha
            expected = GradientMatching([there], row, data.y[None])(z[:, :-1], row)[0]
            torch.testing.assert_close(problem(z, row)[0], expected)
        z[0, -1], step = 0.3, torch.zeros_like(z)
        step[0, -1] = 1e-5
        slope = (problem(z + step, row)[0] - problem(z - step, row)[0]) / 2e-5
        assert problem(z, row)[1][0, -1].item() == pytest.approx(slope.item(), rel=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_simulating_epochs_beats_one_gradient():
    victims = [victim(v, LocalSpec(2, 2, 1.0)) for v in (1, 2, 3)]
    naive = mean_psnr(Inverting(simulate=False, steps=600), victims)
    assert naive < 12
    assert mean_psnr(DLFA(steps=300), victims) > naive + 15


def test_a_surrogate_beats_one_gradient_after_many_steps():
    victims = [victim(v, LocalSpec(10, 2, 0.05)) for v in range(3)]
    naive = mean_psnr(Inverting(simulate=False, steps=600), victims)
    assert mean_psnr(SME(steps=600, restarts=1), victims) > naive + 5


def test_an_unknown_recipe_needs_no_surrogate_to_change():
    seen, private = victim(1, LocalSpec(5, None, 0.05))
    attack, known = SME(steps=20), replace(seen, labels=private.y)
    there, unknown = attack(known, seeded()), attack(replace(known, local=None), seeded())
    torch.testing.assert_close(there.x, unknown.x)


@pytest.mark.parametrize(("number", "local"), [(1, LocalSpec(1, None, 1.0)), (1, LocalSpec(5, None, 0.05))])
def test_recipe_without_batches_is_found(number, local):
    seen, _ = victim(number, local, known=False)
    found = recipe.estimate(seen, seeded())
    assert (found.epochs, found.batch) == (local.epochs, None)
    assert found.lr == pytest.approx(local.lr, rel=0.01)


def test_recipe_with_batches_is_found():
    seen, _ = victim(1, LocalSpec(2, 2, 0.1), known=False)
    found = recipe.estimate(seen, seeded(), steps=40)
    assert (found.epochs, found.batch) == (2, 2)
    assert found.lr == pytest.approx(0.1, rel=0.01)


def test_a_short_path_tells_only_its_length():
    seen, _ = victim(1, LocalSpec(5, None, 0.002), known=False)
    found = recipe.estimate(seen, seeded())
    assert found.lr * found.steps(4) == pytest.approx(0.01, rel=0.01)


def test_of_equal_matches_the_fewest_steps_win(monkeypatch):
    tried = [(10, 1e-5), (5, 2e-5), (2, 2.9e-5), (1, 3.1e-5)]
    found = [recipe.Candidate(LocalSpec(e, None, 0.1), loss) for e, loss in tried]
    monkeypatch.setattr(recipe, "candidates", lambda *a: found)
    assert recipe.estimate(observe(tiny_model(), tiny_examples(2)), seeded()).epochs == 2


def test_clients_of_different_recipes_are_attacked_apart():
    seen = [victim(v, LocalSpec(e, 2, 0.5))[0] for v, e in ((1, 2), (2, 1), (3, 2))]
    attack = DLFA(steps=5, restarts=2)
    together = attack.many(seen, [seeded(v) for v in range(3)])
    for v in range(3):
        torch.testing.assert_close(together[v].x, attack(seen[v], seeded(v)).x, rtol=1e-4, atol=1e-5)


def test_attacks_estimate_what_is_unknown(monkeypatch):
    seen, other = (victim(v, LocalSpec(2, 2, 0.5))[0] for v in (1, 2))
    monkeypatch.setattr(recipe, "estimate", lambda o, rng: LocalSpec(2, 2, 0.5))
    attack = DLFA(steps=5, restarts=2)
    known = attack.many([other, seen], [seeded(), seeded()])
    found = attack.many([other, replace(seen, local=None)], [seeded(), seeded()])
    assert found[1].x.shape == (4, 1, 8, 8)
    assert found[1].adaptation.startswith("local training estimated: E=2, B=2, η=0.5")
    assert not found[0].adaptation
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a.x, b.x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DLFA(rec="l2"), "rec must be one of"),
        (lambda: DLFA(g="min"), "g must be one of"),
        (lambda: DLFA(d_inv="l3"), "d_inv must be one of"),
        (lambda: DLFA(inv=-1), "inv must be >= 0, got -1"),
        (lambda: DLFA(tv=-1), "tv must be >= 0, got -1"),
        (lambda: SME(alpha=1.5), "alpha must be between 0 and 1, got 1.5"),
        (lambda: SME(beta=-1), "beta must be >= 0, got -1"),
        (lambda: SME(tv=-1), "tv must be >= 0, got -1"),
        (lambda: recipe.estimate(observe(tiny_model(), tiny_examples(2)), seeded(), restarts=0), "restarts"),
        (lambda: recipe.estimate(observe(tiny_model(), tiny_examples(2)), seeded(), steps=0), "steps"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_broken_update_is_refused_before_its_recipe_is_sought(monkeypatch):
    monkeypatch.setattr(recipe, "infer", lambda *a: pytest.fail("began"))
    seen = observe(tiny_model(), tiny_examples(2), local=None)
    broken = replace(seen, update=seen.update * float("nan"))
    with pytest.raises(InputError, match="update must be finite"):
        DLFA()(broken, seeded())


def test_lbfgs_runs_local_steps_through_when_asked():
    def psnr(options):
        scene = Scene(
            attack=registry.make_attack(f"idlg:{options}", steps=150, restarts=1),
            data="digits",
            victims=2,
            local=LocalSpec(3, None, 1.0),
        )
        return run(scene).report["metrics"]["psnr_db"]["mean"]

    assert psnr("simulate=true") > psnr("simulate=false") + 3
