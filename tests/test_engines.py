"""Every engine against a plain loop over clients with torch.optim, on the same random order."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fltoolkit import models
from fltoolkit.checks import check_device
from fltoolkit.errors import InputError
from fltoolkit.loss import IGNORE, cross_entropy
from fltoolkit.models.text import LanguageModel, PeepholeLstm
from fltoolkit.training.engines import ENGINES, choose, graphed, looped
from fltoolkit.training.engines.base import draws, visiting
from fltoolkit.training.engines.fused import _DescendingLinear
from fltoolkit.types import Examples, Layout, LocalSpec

pytestmark = pytest.mark.usefixtures("two_threads")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Every engine but the one made for CPUs is held to the plain loop there too."""


def one_by_one(count, buffer, rng):
    """The places of a client's examples as they come out of a shuffle buffer, by moving them."""
    if buffer is None or buffer >= count:
        return list(rng.permutation(count))
    waiting, lying, order = list(range(buffer, count)), list(range(buffer)), []
    for place in rng.integers(buffer, size=count - buffer):
        order.append(lying[place])
        lying[place] = waiting.pop(0)
    return order + list(rng.permutation(lying))


def plain_loop(model, params, data, local, rngs):
    """ClientUpdate of McMahan et al. 2017, Algorithm 1, client by client, as one reads it."""
    layout, rows = Layout.of(model), []
    for d, rng in zip(data, rngs, strict=True):
        mine = copy.deepcopy(model)
        nn.utils.vector_to_parameters(params.clone(), mine.parameters())
        optimiser = torch.optim.SGD(
            mine.parameters(), local.lr, momentum=local.momentum, weight_decay=local.weight_decay
        )
        batches = torch.tensor(one_by_one(len(d), local.buffer, rng)).split(local.batch or len(d))
        for _ in range(local.epochs):
            for b in batches:
                optimiser.zero_grad()
                cross_entropy(mine(d.x[b]), d.y[b]).mean().backward()
                optimiser.step()
        rows.append(layout.row(mine) - params)
    return torch.stack(rows)


def clients(shape, classes, sizes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        Examples(torch.rand(n, *shape, generator=rng), torch.randint(classes, (n,), generator=rng))
        for n in sizes
    ]


class TwiceUsed(nn.Module):
    """One linear layer called twice, another with its weight tied to a third."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.tied = nn.Linear(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.again.weight
        self.twice, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x.flatten(1)))
        h = torch.tanh(self.tied(torch.tanh(self.again(h))))
        return self.out(torch.tanh(self.twice(torch.tanh(self.twice(h)))))


class Listed(nn.Module):
    """Its Sequential is a mere list, of whose second layer somebody wants the output."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.out = nn.Linear(32, 4)

    def forward(self, x):
        high = self.layers[:2](x)
        low = self.layers[2](high)
        return self.out(torch.cat([high.mean((2, 3)), low.amax((2, 3))], 1))


def builders():
    def named(name, shape):
        return lambda: models.build(name, shape, 4, torch.Generator().manual_seed(1)), shape

    def seeded(make):
        def build():
            torch.manual_seed(2)
            return make()

        return build

    narrow = seeded(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 4)
        )
    )
    grouped = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 4)
        )
    )
    normed = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)
        )
    )
    return {
        "2nn": named("2nn", (1, 3, 3)),
        "mlp": named("mlp", (1, 3, 3)),
        "softmax": named("softmax", (1, 3, 3)),
        "narrow": (narrow, (1, 3, 3)),
        "cnn": named("cnn", (1, 8, 8)),
        "lenet": named("lenet", (3, 8, 8)),
        "grouped": (grouped, (2, 4, 4)),
        "normed": (normed, (2, 4, 4)),
        "listed": (seeded(Listed), (1, 8, 8)),
        "twice": (seeded(TwiceUsed), (9,)),
    }


RECIPES = {
    "fedsgd": LocalSpec(1, None, 0.3),
    "short last batch": LocalSpec(2, 4, 0.1),
    "momentum": LocalSpec(2, 5, 0.05, momentum=0.9),
    "decay": LocalSpec(2, 5, 0.1, weight_decay=0.1),
    "both": LocalSpec(1, 3, 0.05, momentum=0.5, weight_decay=0.1),
    "batch above the data": LocalSpec(2, 100, 0.1),
    "shuffle buffer": LocalSpec(2, 4, 0.1, buffer=3),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", builders())
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_equals_the_plain_loop(engine, model, recipe):
    assert_plain(engine, model, recipe)


def assert_plain(engine, model, recipe):
    """The engine's rows are those of the plain loop, and nothing else has changed."""
    build, shape = builders()[model]
    net, local = build(), RECIPES[recipe]
    if ENGINES[engine].refuses(net, cross_entropy, shape):
        pytest.skip(f"{engine} does not train {model}")
    data = clients(shape, 4, (7, 1, 12, 4, 12))
    params = Layout.of(net).row(net)
    before, kept = params.clone(), copy.deepcopy(net)

    def rngs():
        return [np.random.default_rng(k) for k in range(len(data))]

    rows = choose(net, cross_entropy, shape, engine)(params, data, local, rngs())
    expected = plain_loop(net, params, data, local, rngs())
    assert expected.abs().max() > 1e-3
    assert (rows - expected).abs().max() / expected.abs().max() < 1e-4
    if DEVICE != "cpu" and engine != "compiled":
        assert_same_on_the_gpu(engine, net, shape, data, local, expected)
    assert torch.equal(params, before)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), kept.parameters(), strict=True))


@pytest.mark.parametrize("recipe", ["fedsgd", "momentum", "decay", "batch above the data"])
def test_a_large_batch_in_pieces_is_the_batch(recipe, monkeypatch):
    monkeypatch.setattr(looped, "PIECE", 4)
    assert_plain("looped", "cnn", recipe)
    monkeypatch.setattr(graphed, "AT_ONCE", 15)
    assert_plain("graphed", "cnn", recipe)
    monkeypatch.setattr(graphed, "ALONE_FROM", 1)
    assert_plain("graphed", "cnn", recipe)


def test_programs_kept_from_round_to_round_start_from_nothing():
    """One engine for cohorts of other sizes, starts, batches and learning rates."""
    build, shape = builders()["cnn"]
    net = build()
    engine, params = choose(net, cross_entropy, shape, "graphed"), Layout.of(net).row(net)
    for local in (RECIPES["both"], RECIPES["momentum"]):
        for sizes, scale in (((7, 1, 12, 4, 12), 1.0), ((12, 12, 3, 2, 8), 0.9), ((5, 4), 1.1)):
            start, data, kept = params * scale, clients(shape, 4, sizes), []
            for lr in (local.lr, local.lr / 5):
                now = replace(local, lr=lr)
                rows = engine(start, data, now, [np.random.default_rng(k) for k in range(len(data))])
                expected = plain_loop(
                    net, start, data, now, [np.random.default_rng(k) for k in range(len(data))]
                )
                assert (rows - expected).abs().max() / expected.abs().max() < 1e-4
                kept.append(list(engine.kept.values())[-1])
            assert kept[0] is kept[1]
            assert len(engine.kept) <= graphed.KEPT


def test_programs_of_a_round_in_chunks_are_all_kept():
    build, shape = builders()["cnn"]
    net = build()
    engine, params = choose(net, cross_entropy, shape, "graphed"), Layout.of(net).row(net)
    seen = []
    for _ in range(2):
        for sizes in ((4, 4, 4), (4, 4)):
            rngs = [np.random.default_rng(0)] * len(sizes)
            engine(params, clients(shape, 4, sizes), RECIPES["fedsgd"], rngs)
            seen.append(list(engine.kept.values()))
    assert seen[1] == seen[2] == seen[3]


@pytest.mark.parametrize(
    ("count", "buffer"), [(200, 3), (200, 60), (200, 199), (200, 200), (5, 9), (6, 1), (1, 1)]
)
def test_a_shuffle_buffer_is_one_whose_examples_are_moved(count, buffer):
    for seed in range(5):
        drawn = visiting(count, LocalSpec(buffer=buffer), np.random.default_rng(seed)).tolist()
        assert drawn == one_by_one(count, buffer, np.random.default_rng(seed))
        assert sorted(drawn) == list(range(count))


def test_every_example_may_leave_a_shuffle_buffer_at_any_time_after_it_came():
    """The chance that the first of two in the buffer is drawn at once is 1/2, then 1/4, ..."""
    rng = np.random.default_rng(0)
    at = [visiting(6, LocalSpec(buffer=2), rng).tolist().index(0) for _ in range(4000)]
    found = np.bincount(at, minlength=6) / 4000
    assert np.abs(found - np.array([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32])).max() < 0.03


def test_a_convolution_is_the_product_over_its_windows():
    """Forward and backward, in double precision, with and without bias and padding."""
    for padding, bias, size in (((1, 2), True, (3, 5)), ((0, 0), False, (2, 2)), ((2, 2), True, (5, 5))):
        torch.manual_seed(1)
        plain = nn.Sequential(nn.Conv2d(2, 3, size, padding=padding, bias=bias)).double()
        flat = copy.deepcopy(plain)
        graphed.flatten_convolutions(flat)
        assert type(flat[0]) is not nn.Conv2d
        x = torch.randn(4, 2, 7, 6, dtype=torch.double, requires_grad=True)
        weight = torch.randn_like(plain(x))
        found = [torch.autograd.grad((m(x) * weight).sum(), [x, *m.parameters()]) for m in (plain, flat)]
        assert torch.allclose(plain(x), flat(x), atol=1e-12)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))
    strided = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(3, 3, 1, padding=1))
    graphed.flatten_convolutions(strided)
    assert all(type(m) is nn.Conv2d for m in strided)


def test_layers_that_mix_a_batch_are_not_cut():
    mixing = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.BatchNorm1d(2)))
    assert not looped.separable(mixing)
    assert not looped.separable(TwiceUsed())
    assert looped.separable(models.build("cnn", (1, 28, 28), 10, torch.Generator()))


def lines(sizes, tokens=7, length=9):
    """Lines of token ids with the next token as label, of any length from 1 up, padded at their end."""
    rng = np.random.default_rng(0)
    data = []
    for n in sizes:
        ids = torch.from_numpy(rng.integers(0, tokens - 1, (n, length + 1)))
        end = torch.from_numpy(rng.integers(1, length + 1, (n, 1)))
        beyond = torch.arange(length) >= end
        x = ids[:, :-1].masked_fill(beyond, tokens - 1)
        data.append(Examples(x, ids[:, 1:].masked_fill(beyond, IGNORE)))
    return data


@pytest.mark.parametrize("units", [5, 16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", ["looped", "vmapped", "graphed"])
def test_engine_trains_language_models_as_the_plain_loop(engine, recipe, units):
    """Two peephole layers over lines of unequal length; looped skips the padding, which the plain loop
    does not, and takes layers of 16 units through the compiled kernels."""
    torch.manual_seed(3)
    net = LanguageModel(7, 3, units, 2)
    for layer in net.layers:
        layer.reset(torch.Generator().manual_seed(4))
    local, data = RECIPES[recipe], lines((7, 1, 12, 4))
    params = Layout.of(net).row(net)

    def rngs():
        return [np.random.default_rng(k) for k in range(len(data))]

    rows = choose(net, cross_entropy, (9,), engine)(params, data, local, rngs())
    expected = plain_loop(net, params, data, local, rngs())
    assert expected.abs().max() > 1e-3
    assert (rows - expected).abs().max() / expected.abs().max() < 1e-4
    if DEVICE != "cpu":
        assert_same_on_the_gpu(engine, net, (9,), data, local, expected)


def assert_same_on_the_gpu(engine, net, shape, data, local, expected):
    """Three times, the last from programs that are recorded by then."""
    check_device(DEVICE)
    net = copy.deepcopy(net).to(DEVICE)
    data = [Examples(d.x.to(DEVICE), d.y.to(DEVICE)) for d in data]
    params = Layout.of(net).row(net)
    trained = choose(net, cross_entropy, shape, engine)
    for _ in range(3):
        rows = trained(params, data, local, [np.random.default_rng(k) for k in range(len(data))]).cpu()
        assert (rows - expected).abs().max() / expected.abs().max() < 1e-4


def test_peephole_layer_is_its_equations_step_by_step():
    """Against NumPy, one number at a time; without peepholes, against torch.nn.LSTM."""
    layer = PeepholeLstm(3, 4)
    layer.reset(torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    w, u, b, p = (t.detach().double().numpy() for t in layer.parameters())

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    expected = np.zeros((2, 5, 4))
    for n in range(2):
        h = c = np.zeros(4)
        for t in range(5):
            o, i, f, g = np.split(w @ x[n, t].numpy() + u @ h + b, 4)
            c, before = np.zeros(4), c
            for k in range(4):
                keep, add = sigmoid(f[k] + p[8 + k] * before[k]), sigmoid(i[k] + p[4 + k] * before[k])
                c[k] = keep * before[k] + add * np.tanh(g[k])
            h = sigmoid(o + p[:4] * c) * np.tanh(c)
            expected[n, t] = h
    assert np.abs(layer(x).detach().numpy() - expected).max() < 1e-6

    theirs = nn.LSTM(3, 4, batch_first=True)
    with torch.no_grad():
        layer.peephole.zero_()
        order = torch.tensor([1, 2, 3, 0])
        for mine, name in (
            (layer.input_weight, "weight_ih_l0"),
            (layer.hidden_weight, "weight_hh_l0"),
            (layer.bias, "bias_ih_l0"),
        ):
            getattr(theirs, name).copy_(mine.unflatten(0, (4, 4))[order].flatten(0, 1))
        theirs.bias_hh_l0.zero_()
    assert (layer(x) - theirs(x)[0]).abs().max() < 1e-6


def test_a_cohort_leaves_no_copy_of_the_model_behind():
    """Not even until the garbage collector comes by: a copy of a large model is as large as an update."""
    net = models.build("cnn", (1, 8, 8), 4, torch.Generator().manual_seed(1))
    engine, params = choose(net, cross_entropy, (1, 8, 8), "looped"), Layout.of(net).row(net)
    gc.collect()
    gc.disable()
    try:
        engine(params, clients((1, 8, 8), 4, (4, 4)), LocalSpec(1, 2, 0.1), [np.random.default_rng(0)] * 2)
        left = [o for o in gc.get_objects() if type(o) is _DescendingLinear]
    finally:
        gc.enable()
    assert left == []


def test_dropout_inside_larger_layers_is_seen():
    for make in (nn.LSTM, nn.GRU, nn.RNN):
        assert draws(make(4, 4, num_layers=2, dropout=0.1))
        assert not draws(make(4, 4, num_layers=2))
        assert not draws(make(4, 4, num_layers=2, dropout=0.1).eval())
    assert draws(nn.MultiheadAttention(4, 2, dropout=0.1))
    assert not draws(nn.MultiheadAttention(4, 2))


def test_programs_over_clients_refuse_what_draws_random_numbers():
    drops = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(9, 4))
    for name in ("vmapped", "graphed"):
        with pytest.raises(
            InputError, match=f"engine '{name}' cannot train this model: its forward pass draws"
        ):
            choose(drops, cross_entropy, (1, 3, 3), name)
    assert choose(drops, cross_entropy, (1, 3, 3)).name == "looped"


def test_every_engine_trains_something_here():
    able = {
        e: [m for m, (b, s) in builders().items() if not ENGINES[e].refuses(b(), cross_entropy, s)]
        for e in ENGINES
    }
    assert able["batched"] == ["2nn", "mlp", "softmax", "narrow"]
    assert able["looped"] == able["vmapped"] == able["graphed"] == list(builders())
