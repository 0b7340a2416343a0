"""Labels are read off updates: exactly where that is possible, within stated bounds where it is not."""

from __future__ import annotations

import dataclasses
import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model
from torch import nn

from fltoolkit.data import load
from fltoolkit.errors import InputError
from fltoolkit.inversion.labels import DEFAULT, STRATEGIES, counts, hypotheses, infer, logit_gradient
from fltoolkit.inversion.labels.counts import likeliest_scale, lower_bounds, noise_covariance
from fltoolkit.inversion.labels.layer import last_layer, momentum_factor, path, scale_is_known
from fltoolkit.inversion.labels.own import own_data
from fltoolkit.inversion.labels.rounding import labels_of, largest_step, nearest_on_simplex, whole
from fltoolkit.loss import cross_entropy
from fltoolkit.metrics.label import label_accuracy
from fltoolkit.types import Examples, Layout, LocalSpec

CLASSES = 10
CLIP = ({"name": "clip", "norm": 1e-3},)


@pytest.fixture(scope="module")
def digits():
    return load("digits").train


def mlp(activation=nn.ReLU, seed=0, bias=True):
    torch.manual_seed(seed)
    hidden = (nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, CLASSES, bias=bias))


def batch_of(digits, labels):
    """Different real digits with just these labels."""
    used, chosen = set(), []
    for label in labels:
        index = next(i for i in (digits.y == label).nonzero().flatten().tolist() if i not in used)
        used.add(index)
        chosen.append(index)
    return digits.take(chosen)


def drawn(digits, number, seed):
    generator = torch.Generator().manual_seed(seed)
    return digits.take(torch.randint(len(digits), (number,), generator=generator))


def seen(model, batch, local=None, **changes):
    """What a server sees of the client's local training, by torch.optim."""
    local = local or LocalSpec(lr=0.1)
    client, layout = deepcopy(model), Layout.of(model)
    optimiser = torch.optim.SGD(client.parameters(), local.lr, local.momentum, 0.0, local.weight_decay)
    size = local.batch or len(batch)
    for _ in range(local.epochs):
        for start in range(0, len(batch), size):
            part = batch.take(slice(start, start + size))
            optimiser.zero_grad()
            cross_entropy(client(part.x), part.y).mean().backward()
            optimiser.step()
    update = layout.row(client) - layout.row(model)
    return observe(model, batch, update=update, local=local, num_classes=CLASSES, **changes)


def accuracy(name, observation, batch):
    return label_accuracy(STRATEGIES[name](observation), batch.y, CLASSES)


def mean_accuracy(name, digits, number, activation=nn.ReLU, local=None, runs=6, **changes):
    total = 0.0
    for run in range(runs):
        batch = drawn(digits, number, run)
        total += accuracy(name, seen(mlp(activation, run), batch, local, **changes), batch)
    return total / runs


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("labels", [[4], [0, 9], [1, 3, 5, 7, 8]])
def test_distinct_labels_are_exact(name, labels, digits):
    found = STRATEGIES[name](seen(mlp(), batch_of(digits, labels)))
    assert found.tolist() == labels
    assert found.dtype == torch.int64


@pytest.mark.parametrize("name", ["llg+", "ilrg", "counts"])
@pytest.mark.parametrize("labels", [[2, 2], [5, 5, 5, 5], [0, 3, 3, 3, 9, 9], [1] * 7 + [6] * 9])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh])
def test_repeated_labels_are_exact(name, labels, activation, digits):
    assert STRATEGIES[name](seen(mlp(activation), batch_of(digits, labels))).tolist() == labels


def test_llg_counts_the_repeats_of_few_classes(digits):
    """Its impact is the mean of the negative entries, so equal numbers come out equal."""
    assert STRATEGIES["llg"](seen(mlp(), batch_of(digits, [3, 3, 3, 8, 8, 8]))).tolist() == [3, 3, 3, 8, 8, 8]


@pytest.mark.parametrize("name", ["sign", "gradinversion"])
def test_strategies_for_distinct_labels_spread_over_classes(name, digits):
    found = STRATEGIES[name](seen(mlp(), batch_of(digits, [2] * 12)))
    assert found.tolist() == sorted([*range(CLASSES), *found.unique(return_counts=True)[1].gt(1).nonzero()])
    assert len(found) == 12


def test_gradinversion_reads_the_minimum_of_a_row():
    """Class 2 has the lowest entry, class 1 the lowest sum and the lowest maximum."""
    model, data = tiny_model(), tiny_examples(1)
    gradient = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    gradient["3.weight"][1], gradient["3.weight"][2, :2] = -1.0, torch.tensor([-3.0, 9.0])
    observation = observe(model, data, update=-Layout.of(model).flatten(gradient))
    assert STRATEGIES["gradinversion"](observation).tolist() == [2]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize(("name", "least"), [("llg+", 0.99), ("ilrg", 0.97), ("counts", 0.99)])
def test_numbers_a_class_at_batch_32(name, least, activation, digits):
    """Mean accuracy over six networks and batches drawn with repeats; guessing gets about 0.8."""
    assert mean_accuracy(name, digits, 32, activation) >= least
    assert mean_accuracy("sign", digits, 32, activation) < 0.9


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh])
def test_default_over_local_steps(activation, digits, monkeypatch):
    """Ten full-batch steps that move the model far: the path matters, its start alone does not suffice."""
    local = LocalSpec(epochs=10, lr=0.5)
    along = mean_accuracy("counts", digits, 64, activation, local)
    assert along >= 0.9
    monkeypatch.setattr("fltoolkit.inversion.labels.own.path", lambda _: [0.0])
    assert mean_accuracy("counts", digits, 64, activation, local) < along - 0.02


@pytest.mark.parametrize(
    "local",
    [
        LocalSpec(epochs=2, batch=8, lr=0.05),
        LocalSpec(epochs=5, lr=0.02, momentum=0.9),
        LocalSpec(epochs=3, lr=0.1, weight_decay=0.3),
    ],
    ids=["batches", "momentum", "decay"],
)
@pytest.mark.parametrize("name", ["llg+", "counts"])
def test_other_recipes(name, local, digits):
    assert mean_accuracy(name, digits, 32, nn.Sigmoid, local) >= 0.99


@pytest.mark.parametrize(("name", "least"), [("llg+", 0.97), ("ilrg", 0.9), ("counts", 0.97)])
@pytest.mark.parametrize("changes", [{"local": None}, {"defenses": CLIP}], ids=["unknown", "clipped"])
def test_scale_of_the_update_is_not_needed(name, least, changes, digits):
    """An update of the wrong length, at a batch of 8, where some classes are absent."""
    total = 0.0
    for run in range(6):
        batch = drawn(digits, 8, run)
        plain = seen(mlp(nn.Sigmoid, run), batch)
        factor = 7.3 if "local" in changes else 1e-3 / float(plain.update.norm())
        total += accuracy(name, replace(plain, update=factor * plain.update, **changes), batch) / 6
    assert total >= least


@pytest.mark.parametrize("name", ["sign", "gradinversion", "llg"])
def test_scale_free_strategies(name, digits):
    plain = seen(mlp(), drawn(digits, 16, 0))
    longer = replace(plain, update=512 * plain.update, local=None)
    assert torch.equal(STRATEGIES[name](plain), STRATEGIES[name](longer))


def test_when_the_scale_is_known(digits):
    plain = seen(mlp(), drawn(digits, 4, 0))
    norm = float(plain.update.norm())
    bites, idle = ({"name": "clip", "norm": norm},), ({"name": "clip", "norm": 2 * norm},)
    assert scale_is_known(plain)
    assert scale_is_known(replace(plain, defenses=idle))
    assert not scale_is_known(replace(plain, defenses=bites))
    assert not scale_is_known(replace(plain, defenses=idle, clients=2))
    assert not scale_is_known(replace(plain, defenses=({"name": "sign"},)))
    assert not scale_is_known(replace(plain, local=None))


def test_momentum_and_decay_are_taken_out(digits):
    """By hand: Σ_j (1 − μ^j) / (1 − μ) / u, and the gradient with λ w removed at one step."""
    assert momentum_factor(LocalSpec(momentum=0.5), 3) == pytest.approx((1 + 1.5 + 1.75) / 3)
    model, batch = mlp(), drawn(digits, 4, 0)
    decayed = last_layer(seen(model, batch, LocalSpec(lr=0.1, weight_decay=0.5)))
    plain = last_layer(seen(model, batch, LocalSpec(lr=0.1)))
    assert (decayed.weight_gradient - plain.weight_gradient).abs().max() < 1e-5
    assert (decayed.bias_gradient - plain.bias_gradient).abs().max() < 1e-5


def trained(digits, seed=0, steps=20):
    model = mlp(seed=seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        batch = digits.take(torch.randint(len(digits), (64,)))
        optimiser.zero_grad()
        cross_entropy(model(batch.x), batch.y).mean().backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("name", ["llg+", "counts"])
def test_public_examples_help_on_a_trained_model(name, digits):
    """Held out: the last 300 digits are public, batches come from the others."""
    public, private = digits.take(slice(-300, None)), digits.take(slice(0, -300))
    without, given = 0.0, 0.0
    for run in range(5):
        batch = drawn(private, 64, run)
        plain = seen(trained(private, run), batch)
        without += accuracy(name, plain, batch) / 5
        given += accuracy(name, replace(plain, auxiliary=public), batch) / 5
    assert given > without
    assert given > 0.98


def test_noise_of_known_size_is_not_taken_for_labels(digits):
    """Noise that drowns the gradient: told of it, the estimate does not follow it."""
    plain = seen(mlp(), drawn(digits, 64, 0))
    noise = 5.0 * torch.randn(plain.update.shape, generator=torch.Generator().manual_seed(1))
    largest = []
    for told in (0.005, 1e-9):
        gaussian = {"name": "gaussian", "noise_multiplier": told, "placement": "client"}
        defenses = ({"name": "clip", "norm": 1000.0}, gaussian)
        found = STRATEGIES["counts"](replace(plain, update=plain.update + noise, defenses=defenses))
        largest.append(int(torch.bincount(found, minlength=CLASSES).max()))
    assert largest[0] < 10 < 14 < largest[1]


def test_bounds_are_true_and_kept(digits):
    """On trained models: what is proved holds, and the estimate keeps to it."""
    proved = 0
    for run in range(5):
        batch = drawn(digits, 8, run)
        observation = seen(trained(digits, run, steps=100), batch)
        bounds = lower_bounds(observation, last_layer(observation), own_data(observation))
        true, found = (
            torch.bincount(y, minlength=CLASSES) for y in (batch.y, STRATEGIES["counts"](observation))
        )
        assert (bounds <= true).all()
        assert (bounds <= found).all()
        proved += int(bounds.sum())
    assert proved > 20


def test_noise_of_a_batch_is_as_measured(digits):
    """V against what batches of one example a class, drawn from the public examples, really scatter."""
    model, public = trained(digits), digits.take(slice(0, 1000))
    observation = replace(seen(model, batch_of(digits, range(CLASSES))), auxiliary=public)
    predicted = noise_covariance(observation, last_layer(observation), own_data(observation)).trace()
    residuals = (model(public.x).softmax(-1) - nn.functional.one_hot(public.y, CLASSES)).detach()
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(2000, CLASSES)
    for c in range(CLASSES):
        of_class = residuals[public.y == c]
        sums += of_class[torch.randint(len(of_class), (2000,), generator=generator)]
    assert float(predicted) == pytest.approx(float(torch.cov(sums.T).trace()), rel=0.15)


def test_local_steps_are_those_of_one_client(digits):
    local = LocalSpec(epochs=3, batch=2)
    several = replace(observe(tiny_model(), tiny_examples(12), local=local), clients=3)
    assert several.local_steps == 6
    assert path(several) == [t / 6 for t in range(6)]
    assert path(replace(several, local=None)) == [0.0]
    assert path(replace(several, defenses=({"name": "gaussian"},))) == [0.0]


def test_likeliest_scale_is_the_maximum_of_its_density():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.double, generator=generator)
    inverse, (seen_, expected) = root @ root.T, torch.randn(2, 4, dtype=torch.double, generator=generator)
    t = torch.linspace(1e-3, 20, 200_001, dtype=torch.double)
    off = t[:, None] * seen_ - expected
    density = 3 * t.log() - 0.5 * torch.einsum("ti,ij,tj->t", off, inverse, off)
    assert likeliest_scale(inverse, seen_, expected) == pytest.approx(float(t[density.argmax()]), abs=1e-3)


def test_a_layer_without_bias(digits):
    """Sums of the weight gradient stand in for the bias gradient, where features are positive."""
    for run in range(3):
        batch = drawn(digits, 16, run)
        observation = seen(mlp(nn.Sigmoid, run, bias=False), batch)
        weight = observation.layout.unflatten(observation.gradient)["5.weight"]
        assert torch.equal(logit_gradient(observation), weight.sum(1))
        assert accuracy("counts", observation, batch) >= 15 / 16
        assert accuracy("llg+", observation, batch) >= 15 / 16
    with pytest.raises(InputError, match=r"model must have a bias in its last layer .* got '5.weight'"):
        STRATEGIES["ilrg"](observation)


def test_several_clients(digits):
    """The mean of three clients' updates, four examples each: labels of all twelve."""
    model = mlp(nn.Sigmoid)
    batches = [drawn(digits, 4, run) for run in range(3)]
    update = torch.stack([seen(model, b, LocalSpec(epochs=3, lr=0.1)).update for b in batches]).mean(0)
    every = Examples(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))
    observation = replace(seen(model, every, LocalSpec(epochs=3, lr=0.1)), update=update, clients=3)
    assert STRATEGIES["counts"](observation).tolist() == every.y.sort().values.tolist()


@pytest.mark.parametrize("name", STRATEGIES)
def test_contract(name, digits):
    """As many labels as examples, increasing, in range; the same twice; observation and random
    state untouched, with a model that has buffers and dropout."""
    hidden = (nn.BatchNorm1d(64), nn.Linear(64, 32), nn.Dropout(), nn.Sigmoid())
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, CLASSES))
    observation = replace(seen(model, drawn(digits, 37, 0)), auxiliary=digits.take(slice(0, 50)))
    for o in (observation, replace(observation, auxiliary=None)):
        before = [v.clone() for v in _tensors(o)]
        state = torch.get_rng_state()
        found = STRATEGIES[name](o)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(before, _tensors(o), strict=True))
        assert o.model.training
        assert found.shape == (37,)
        assert torch.equal(found, found.sort().values)
        assert found.min() >= 0
        assert found.max() < CLASSES
        assert torch.equal(found, STRATEGIES[name](o))


def _tensors(observation):
    fields = [getattr(observation, f.name) for f in dataclasses.fields(observation)]
    public = [] if observation.auxiliary is None else [observation.auxiliary.x, observation.auxiliary.y]
    tensors = [v for v in fields if isinstance(v, torch.Tensor)]
    return [*tensors, *observation.model.state_dict().values(), *public]


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_update_of_zeros_gives_as_many_labels(name):
    model, data = tiny_model(), tiny_examples(6)
    found = STRATEGIES[name](observe(model, data, update=torch.zeros(Layout.of(model).size)))
    assert found.shape == (6,)


@pytest.mark.parametrize("name", STRATEGIES)
def test_models_that_do_not_end_in_a_linear_layer(name):
    model, data = tiny_model(), tiny_examples(2)
    start = (nn.Flatten(), nn.Linear(25, 7))
    for wrong in (nn.Sequential(*start), nn.Sequential(*start, nn.Linear(7, 4), nn.LayerNorm(4))):
        layout = Layout.of(wrong)
        update = torch.zeros(layout.size)
        bad = replace(observe(model, data), model=wrong, layout=layout, params=update, update=update)
        with pytest.raises(
            InputError, match=r"model must end in a linear layer with 4 outputs .* got '[13]\."
        ):
            STRATEGIES[name](bad)


def test_inputs_that_the_model_does_not_take():
    bad = observe(tiny_model(), tiny_examples(2), input_shape=(3, 3))
    with pytest.raises(InputError, match=r"own data must be inputs that the model takes, got .*\(3, 3\)"):
        STRATEGIES["counts"](bad)


def test_infer_by_name():
    observation = observe(tiny_model(), tiny_examples(3))
    assert torch.equal(infer("auto", observation), STRATEGIES[DEFAULT](observation))
    assert torch.equal(infer("sign", observation), STRATEGIES["sign"](observation))
    with pytest.raises(InputError, match=r"unknown label strategy 'sing'; did you mean 'sign'"):
        infer("sing", observation)
    assert all(s.__doc__ for s in STRATEGIES.values())


def test_rounding():
    assert whole(torch.tensor([1.2, 2.8, -0.3, 0.1]), 4).tolist() == [1, 3, 0, 0]
    assert whole(torch.tensor([0.5, 0.5]), 1).tolist() == [1, 0]
    assert nearest_on_simplex(torch.tensor([3.0, 1.0, -5.0]), 3).tolist() == [2.5, 0.5, 0.0]
    assert labels_of(torch.tensor([0, 2, 1])).tolist() == [1, 1, 2]
    assert largest_step(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-0.5, -2.0, 4.0])) == 1.0


def test_plausible_labels_are_those_that_surprise_least():
    """Against every number a class that there is, ranked one by one."""
    model, data = tiny_model(), tiny_examples(3)
    o = observe(model, data)
    held = counts.belief(o)
    # As if more were in doubt than is.
    mean, spread = torch.tensor([1.3, 0.4, 0.9, 0.4]).double(), torch.tensor([0.2, 0.7, 0.1, 0.4]).double()
    bounds = torch.tensor([1, 0, 0, 0])
    doubt = replace(held, mean=mean, covariance=torch.diag(spread), bounds=bounds)
    every = [k for k in itertools.product(range(4), repeat=4) if sum(k) == 3]
    every = [k for k in every if all(n >= b for n, b in zip(k, doubt.bounds.tolist(), strict=True))]
    eye = 0.1 * torch.eye(4).double()

    def surprise(k):
        apart = torch.tensor(k).double() - doubt.mean
        return float(apart @ torch.linalg.inv(doubt.covariance + eye) @ apart)

    ranked = sorted(every, key=surprise)
    first = tuple(doubt.best.tolist())
    ranked.remove(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "belief", lambda o: doubt)
        found = [tuple(torch.bincount(y, minlength=4).tolist()) for y in counts.plausible(o, 6)]
        patch.setattr(counts, "MARGIN", 3.0)
        many = counts.plausible(o, 1000)
    assert found == [first, *ranked[:5]]
    assert len(many) == 1 + sum(surprise(k) <= surprise(first) + 3 for k in ranked) < len(every)


def test_what_is_believed_is_what_is_left_of_the_joint_distribution():
    """Mean and covariance against conditioning the joint normal of k and N g, by its precision."""
    rng = torch.Generator().manual_seed(0)
    number, a = 6, torch.randn(4, 4, generator=rng).double()
    noise = 0.3 * torch.eye(4).double()
    seen_ = a @ torch.tensor([3.0, 2, 1, 0]).double() + 0.1
    mean, covariance = counts._estimate(counts.Linear(a, noise), seen_, number, True)
    close = []
    for f in (1.0, 2.0, 4.0):
        prior = f * number / 4 * (torch.eye(4).double() - 0.25) + 1e-9 * torch.eye(4).double()
        joint = torch.cat(
            [torch.cat([prior, prior @ a.T], 1), torch.cat([a @ prior, a @ prior @ a.T + noise], 1)]
        )
        precision = torch.linalg.inv(joint)
        left = torch.linalg.inv(precision[:4, :4])
        expected = number / 4 - left @ precision[:4, 4:] @ (seen_ - a @ torch.full((4,), number / 4).double())
        close.append(
            torch.allclose(covariance, left, atol=1e-4) and torch.allclose(mean, expected, atol=1e-4)
        )
    assert sum(close) == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_first_hypothesis_is_what_is_inferred(digits, name):
    o = seen(mlp(), drawn(digits, 8, 1), LocalSpec(5, None, 0.1))
    found = hypotheses(name, o, 5)
    assert found[0].equal(infer(name, o))
    assert len(found) == 1 or name == "counts"
    assert (found.sort(1).values == found).all()


def test_nothing_else_is_plausible_where_nothing_is_in_doubt(digits):
    o = seen(mlp(), drawn(digits, 8, 1))
    assert len(hypotheses("auto", o, 5)) == 1
