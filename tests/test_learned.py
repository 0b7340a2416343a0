"""The inverter: hashing, matching, and what it reads off protected updates of digits, in measured numbers."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model

from attacks.learned import Learned, Simulation, simulated
from fltoolkit import models
from fltoolkit.attack import grouped
from fltoolkit.audit import Scene, Stage
from fltoolkit.data import load
from fltoolkit.errors import InputError
from fltoolkit.inversion.inverter import Hashing, Inverter, matched_loss, matching, one_round, read
from fltoolkit.registry import make_stack
from fltoolkit.scoring import score, truth_of
from fltoolkit.types import Examples, Layout, LocalSpec

NOISE = ("clip:norm=0.5", "gaussian:noise_multiplier=0.01,placement=client")
SMALL = Learned(steps=150, features=1024, hidden=128, simulations=2048)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def seen(digits, defenses=(), batch=1, victims=16, **changes):
    """Victims of one broadcast model: what the adversary sees of each, and the truth."""
    scene = {"model": models.build("mlp", digits.input_shape, 10, seeded()), "attack": "dlg", "data": digits}
    stage = Stage(Scene(**scene, defenses=defenses, batch=batch, victims=victims, **changes))
    observations, truths = [], []
    for v in range(victims):
        transcript, public = stage.round(v)
        observation = stage.threat.observe(transcript, 0, public)
        observations.append(dataclasses.replace(observation, auxiliary=digits.test, round=0))
        truths.append(truth_of(transcript, stage.threat.members(transcript, 0)))
    return observations, truths


def measured(digits, attack, observations, truths):
    """Mean gain over the best trivial guess in dB, mean label accuracy, and the reconstructions."""
    found = attack.many(observations, [seeded(i) for i in range(len(observations))])
    mean = digits.train.x.mean(0)
    scored = [score(f, t, mean, (0.0, 1.0), 10) for f, t in zip(found, truths, strict=True)]
    gain = torch.cat([s.gain for s in scored]).mean()
    return float(gain), sum(s.labels for s in scored) / len(scored), found


def lesson(model=None, count=1, protection=(), **changes):
    """A small observation with public data of its kind."""
    model = model or tiny_model()
    values = {"auxiliary": tiny_examples(24, seed=7), "defenses": make_stack(protection).public()}
    return observe(model, tiny_examples(count), **(values | changes))


def test_one_digit_comes_back(digits):
    """Measured: 3.8 to 4.1 dB over three seeds, all labels; the best trivial guess scores 11.5 dB."""
    gain, labels, found = measured(digits, SMALL, *seen(digits))
    assert 3 < gain < 5.5
    assert (labels, found[0].evaluations) == (1.0, 360)
    assert "360 auxiliary examples, without defenses" in found[0].note


def test_clipping_costs_the_attack_nothing(digits):
    """Measured: 3.8 dB as without; an inverter trained on unclipped updates gets -2.4."""
    observations, truths = seen(digits, defenses=("clip:norm=0.5",))
    gain, labels, found = measured(digits, SMALL, observations, truths)
    blind = [dataclasses.replace(o, defenses=()) for o in observations]
    assert 3 < gain < 5
    assert measured(digits, SMALL, blind, truths)[0] < 0
    assert labels > 0.95
    assert found[0].adaptation == "trained on updates through clip:norm=0.5, as the server receives them"


def test_simulated_noise_beats_pretending_there_is_none(digits):
    """Measured: 2.9 to 3.0 dB and all labels; trained on clipped updates without noise, -1.3 to 0.1."""
    observations, truths = seen(digits, defenses=NOISE)
    adaptive, labels, found = measured(digits, SMALL, observations, truths)
    blind = [dataclasses.replace(o, defenses=o.defenses[:1]) for o in observations]
    unaware, _, _ = measured(digits, SMALL, blind, truths)
    assert adaptive > 2
    assert labels > 0.9
    assert adaptive - unaware > 2
    assert found[0].evaluations == SMALL.simulations


def test_two_digits_come_back(digits):
    """Measured: 3.0 to 3.3 dB, all labels."""
    gain, labels, _ = measured(digits, SMALL, *seen(digits, batch=2, victims=8))
    assert gain > 2
    assert labels > 0.9


@pytest.mark.parametrize("count", [1, 2, 4])
def test_matching_is_the_best_of_all_orders(count):
    guess, truth = torch.rand(20, count, 6, generator=seeded()), torch.rand(20, count, 6, generator=seeded(1))
    order = matching(guess, truth)
    for line in range(20):
        errors = {p: (guess[line, list(p)] - truth[line]).square().sum() for p in permutations(range(count))}
        assert tuple(order[line].tolist()) == min(errors, key=errors.__getitem__)


def test_the_loss_does_not_depend_on_the_order_of_a_batch():
    guess, x = torch.rand(5, 3, 6, generator=seeded()), torch.rand(5, 3, 6, generator=seeded(1))
    logits, y = torch.randn(5, 3, 4, generator=seeded(2)), torch.arange(3).expand(5, 3)
    loss = matched_loss(guess, logits, x, y)
    turned = matched_loss(guess, logits, x[:, [2, 0, 1]], y[:, [2, 0, 1]])
    torch.testing.assert_close(loss, turned)
    error, entropy = matched_loss(x[:, [1, 2, 0]], 50.0 * torch.eye(4)[y[:, [1, 2, 0]]], x, y)
    assert max(float(error), float(entropy)) < 1e-6


def test_hashing_is_linear_deterministic_and_keeps_products():
    a, b = torch.randn(2, 40, 5000, generator=seeded(3)).unbind()
    hashing = Hashing.draw(5000, 512, seeded())
    assert hashing(a).shape == (40, 512)
    torch.testing.assert_close(hashing(2 * a - b), 2 * hashing(a) - hashing(b), rtol=1e-4, atol=1e-4)
    assert torch.equal(hashing(a), Hashing.draw(5000, 512, seeded())(a))
    assert not torch.equal(hashing(a), Hashing.draw(5000, 512, seeded(1))(a))
    products = (hashing(a) * hashing(a + b)).sum(1) / (a * (a + b)).sum(1)
    assert 0.95 < float(products.mean()) < 1.05
    positive = hashing(torch.ones(1, 5000))
    assert 0.7 < float(positive.square().sum() / 5000) < 1.3, "signs: without, it would be about 10"
    assert torch.equal(Hashing.draw(30, 512, seeded())(a[:, :30]), a[:, :30])


def test_known_labels_go_to_the_slots_that_look_like_them():
    net = Inverter(torch.randn(8, 3, generator=seeded()), 4, 3, 2, 4, seeded())
    with torch.no_grad():
        net.labels.weight.zero_()
        net.labels.bias.copy_(9 * torch.eye(4)[[2, 0, 3]].flatten())
    assert read(net, torch.zeros(1, 3), None)[1].tolist() == [2, 0, 3]
    assert read(net, torch.zeros(1, 3), torch.tensor([0, 3, 2]))[1].tolist() == [2, 0, 3]


@pytest.mark.parametrize("local", [LocalSpec(), LocalSpec(2, 2, 0.3, 0.9, 0.01)])
def test_simulation_is_the_clients_own_training(local):
    """Three clients' mean, by plain autograd; each holds one batch."""
    model, batch = tiny_model(), tiny_examples(6, seed=3)
    o = lesson(model, 6, clients=3, local=local)
    found = Simulation(o, 0).trained(Examples(batch.x[None], batch.y[None]))[0]
    for k in range(3):
        copy = tiny_model()
        optimiser = torch.optim.SGD(
            copy.parameters(), local.lr, momentum=local.momentum, weight_decay=local.weight_decay
        )
        for _ in range(local.epochs):
            optimiser.zero_grad()
            part = slice(2 * k, 2 * k + 2)
            torch.nn.functional.cross_entropy(copy(batch.x[part]), batch.y[part]).backward()
            optimiser.step()
        wanted = Layout.of(copy).row(copy) - o.params
        torch.testing.assert_close(found[k], wanted, rtol=1e-4, atol=1e-6)


def test_the_matching_loss_vanishes_at_the_truth():
    data = tiny_examples(2)
    o = lesson(count=2, local=LocalSpec(lr=0.1))
    o = dataclasses.replace(o, update=0.1 * o.update)
    client = Simulation(o, 0)
    assert client.distance(data.x, data.y, o.update) < 1e-8
    assert client.distance(1 - data.x, data.y, o.update) > 1e-3


def test_the_norm_tells_whether_the_server_had_added_its_noise(digits):
    noise = ("clip:norm=0.5", "gaussian:noise_multiplier=0.5,placement=server", "secagg")
    for threat, released in (("server", False), ("aggregate", True)):
        (o,), _ = seen(digits, noise, victims=1, threat=threat, clients=2)
        client = Simulation(o, 0)
        assert client.released is released
        assert [d.name for d in client.stack.defenses] == ["clip", "gaussian"]
        (rows,) = client.observed(client.draw(8, "draw"))
        assert 0.5 < float(rows.norm(dim=1).mean() / o.update.norm()) < 2


def test_every_simulated_round_has_its_own_noise():
    o = lesson(protection=NOISE, auxiliary=tiny_examples(1, seed=7))
    client = Simulation(o, 0)
    batches = client.draw(6, "draw")
    (rows,) = client.observed(batches)
    assert len(batches) == 6
    assert len({tuple(r.tolist()) for r in rows}) == 6
    (again,) = client.observed(batches)
    assert torch.equal(rows, again)


def test_one_inverter_serves_a_round_and_only_it():
    a, other = lesson(), tiny_model(seed=5)
    same = dataclasses.replace(a, update=2 * a.update)
    assert grouped([a, lesson(other), same, lesson(protection=NOISE)], one_round) == [[0, 2], [1], [3]]
    attack = Learned(steps=5, hidden=8)
    found = attack.many([a, lesson(other), same], [seeded(i) for i in range(3)])
    assert torch.equal(found[0].x, attack(a, seeded()).x)
    assert torch.equal(found[2].trace, found[0].trace)
    assert not torch.equal(found[1].trace, found[0].trace)


def test_contract():
    attack, o = Learned(steps=20, hidden=16, simulations=64), lesson(count=2)
    before = {k: v.clone() for k, v in vars(o).items() if isinstance(v, torch.Tensor)}
    found = attack(o, seeded())
    assert (found.x.shape, found.y.shape, found.y.dtype) == ((2, 1, 5, 5), (2,), torch.int64)
    assert found.iterations == len(found.trace) - 1 == 20
    assert found.evaluations == 64
    assert all(torch.equal(v, getattr(o, k)) for k, v in before.items())
    again, other = attack(o, seeded()), attack(o, seeded(1))
    assert torch.equal(found.x, again.x)
    assert not torch.equal(found.x, other.x)
    public = Examples(6 * o.auxiliary.x - 3, o.auxiliary.y)
    wide = attack(dataclasses.replace(o, auxiliary=public, input_range=(-3.0, 3.0)), seeded())
    assert -3 < wide.x.min() < 0 < wide.x.max() < 3
    assert wide.trace[0] < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auxiliary": None}, r"needs public auxiliary data.*digits, mnist"),
        (
            {"auxiliary": Examples(torch.rand(9, 1, 4, 4), torch.zeros(9).long())},
            r"shape \(1, 5, 5\), got .*\(1, 4, 4\)",
        ),
        ({"auxiliary": tiny_examples(2)}, "at least one batch of 3 examples, got 2"),
        ({"auxiliary": tiny_examples(60, classes=9)}, r"auxiliary labels must be in 0..3"),
        ({"clients": 4}, "at least one for each of 4 clients, got 3"),
        ({"defenses": ({"name": "nobody"},)}, "unknown defense 'nobody'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        Learned(steps=1)(lesson(count=3, **changes), seeded())


@pytest.mark.parametrize("option", ["steps", "simulations", "hidden", "features", "batch", "lr"])
def test_options_are_checked(option):
    with pytest.raises(InputError, match=f"{option} must be"):
        Learned(**{option: 0})


def test_defenses_are_rebuilt_from_what_is_public():
    stack = make_stack((*NOISE, "secagg:clients=1"))
    assert simulated(stack.public(), 1).defenses == stack.defenses[:2]
