"""mixup and InstaHide: what they promise, by inputs that show coefficients; training on soft labels."""

from __future__ import annotations

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import tiny_model
from scipy import stats
from torch import nn

from defenses.instahide import InstaHide, allowed_share
from defenses.mixup import Mixup
from fltoolkit import models
from fltoolkit.defense import DefenseStack, Local, RoundContext
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.training.engines import ENGINES, choose
from fltoolkit.types import Examples, Layout, LocalSpec

LEAST_P = 1e-3
"""Below this p-value a goodness-of-fit test fails; seeds are fixed, so it fails always or never."""

DEFENSES = {"mixup": Mixup(), "instahide": InstaHide()}


def context(number=1, seed=5, name="", model=None):
    local = None
    if model is not None:
        layout = Layout.of(model)
        local = Local(model, layout.row(model), cross_entropy, layout)
    return RoundContext(seed, number, (0, 1), torch.full((2,), 0.5), name=name, local=local)


def telling(count, dtype=torch.float32):
    """Examples whose mixtures show their coefficients: input i is the middle of the range, 1/2, but for
    entry i, which is 1; example i alone is of class i."""
    return Examples(0.5 + 0.5 * torch.eye(count, dtype=dtype), torch.arange(count))


def coefficients(mixed):
    """`[N, N]`: how much of input j is in mixture i, up to its sign."""
    return 2 * (mixed.x - 0.5)


def images(count=12, classes=4, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 5, 5, generator=rng)
    return Examples(x, torch.randint(classes, (count,), generator=rng))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEFENSES)
def test_contract(name, dtype):
    """Arguments untouched, types kept, a repeat gives the same; clients, rounds and seeds differ."""
    defense, data = DEFENSES[name], images()
    data = Examples(data.x.to(dtype), data.y)
    x, y, model = data.x.clone(), data.y.clone(), tiny_model()
    modes = [m.training for m in model.modules()]
    stack = DefenseStack([defense])
    done = stack.inputs(data, context(model=model), 0)
    assert torch.equal(data.x, x)
    assert torch.equal(data.y, y)
    assert [m.training for m in model.modules()] == modes
    assert done.x.shape == x.shape
    assert done.y.shape == (12, 4)
    assert done.x.dtype == done.y.dtype == dtype
    again = stack.inputs(data, context(model=model), 0)
    assert torch.equal(done.x, again.x)
    assert torch.equal(done.y, again.y)
    for ctx, client in (
        (context(model=model), 1),
        (context(2, model=model), 0),
        (context(1, 6, model=model), 0),
    ):
        assert not torch.equal(done.x, stack.inputs(data, ctx, client).x)
    assert stack.events(context()) == ()
    assert stack.public()[0]["name"] == name
    rows = torch.randn(2, 7)
    assert torch.equal(stack.clients(rows, context()), rows)


@pytest.mark.parametrize("name", DEFENSES)
def test_labels_and_inputs_are_the_same_convex_combination(name):
    """Label mass is 1, and a label's entries are the inputs' coefficients: here each example has a class of
    its own."""
    data = telling(30, torch.float64)
    mixed = type(DEFENSES[name])(classes=30).inputs(data, context(), 0)
    found = coefficients(mixed)
    shares = found if name == "mixup" else found.abs()
    assert (shares >= -1e-12).all()
    assert torch.allclose(shares.sum(1), torch.ones(30, dtype=torch.float64))
    assert torch.allclose(mixed.y, shares, atol=1e-12)
    assert 0 <= mixed.y.min() <= mixed.y.max() <= 1


@pytest.mark.parametrize("name", DEFENSES)
def test_mixtures_stay_in_the_range_of_inputs(name):
    data = images(200)
    mixed = DEFENSES[name].inputs(data, context(model=tiny_model()), 0)
    assert -1e-6 < mixed.x.min() < 0.3
    assert 0.7 < mixed.x.max() < 1 + 1e-6
    assert torch.allclose(mixed.y.sum(1), torch.ones(200))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_follow_the_beta_distribution(alpha):
    """λ of 1,000 examples, Kolmogorov-Smirnov; partners are a permutation: every example is used twice."""
    count = 1000
    mixed = Mixup(alpha, classes=count).inputs(telling(count, torch.float64), context(), 0)
    used = mixed.y > 0
    own = mixed.y.diagonal()[used.sum(1) == 2]
    assert len(own) > count - 10
    assert stats.kstest(own.numpy(), stats.beta(alpha, alpha).cdf).pvalue > LEAST_P
    partners = used.double()
    partners.fill_diagonal_(0)
    assert partners.sum(0).max() == partners.sum(1).max() == 1
    assert partners.sum() == len(own)


def test_mixup_keeps_the_mean_on_average():
    """Over 2,000 rounds of 6 examples: the mean input is an average of Σ_i (λ_i − 1/2)(x_i − x_π(i)) / 6 off,
    whose standard deviation is at most that of λ, 0.29, here."""
    data = images(6)
    sums = [Mixup(classes=4).inputs(data, context(number), 0) for number in range(2000)]
    for kept, before in (
        (torch.stack([s.x.mean(0) for s in sums]), data.x.mean(0)),
        (torch.stack([s.y.mean(0) for s in sums]), nn.functional.one_hot(data.y, 4).float().mean(0)),
    ):
        assert (kept.mean(0) - before).abs().max() < 5 * 0.29 / 2000**0.5
        assert (kept - before).abs().max() > 0.01


def test_mixup_of_one_example_is_that_example():
    data = images(1)
    mixed = Mixup(classes=4).inputs(data, context(), 0)
    assert torch.allclose(mixed.x, data.x)
    assert torch.allclose(mixed.y, nn.functional.one_hot(data.y, 4).float())


@pytest.mark.parametrize("name", DEFENSES)
def test_the_number_of_classes_comes_from_the_option_or_the_model(name):
    cls, data = type(DEFENSES[name]), images()
    assert cls(classes=9).inputs(data, context(model=tiny_model()), 0).y.shape == (12, 9)
    assert cls().inputs(data, context(model=tiny_model(classes=7)), 0).y.shape == (12, 7)
    with pytest.raises(InputError, match=f"{name} must know the number of classes"):
        cls().inputs(data, context(), 0)
    with pytest.raises(InputError, match=rf"labels of {name} must be one of 0\.\.1 an example"):
        cls(classes=2).inputs(data, context(), 0)
    with pytest.raises(InputError, match=f"inputs of {name} must be real numbers"):
        cls(classes=4).inputs(Examples(torch.zeros(9, 3, dtype=torch.long), data.y[:9]), context(), 0)
    with pytest.raises(InputError, match="classes must be >= 2, got 1"):
        cls(classes=1)


@pytest.mark.parametrize("name", DEFENSES)
def test_counting_classes_draws_nothing_and_leaves_running_statistics_alone(name):
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, 4)
    )
    before, state = torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
    DEFENSES[name].inputs(images(), context(model=model), 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("name", DEFENSES)
def test_labels_that_are_distributions_already_are_mixed_as_they_are(name):
    """So that both defenses may follow each other."""
    data = images()
    soft = Examples(data.x, nn.functional.one_hot(data.y, 4).double())
    hard = type(DEFENSES[name])(classes=4).inputs(data, context(), 0)
    found = type(DEFENSES[name])().inputs(soft, context(), 0)
    assert torch.equal(found.y, hard.y)
    both = DefenseStack([Mixup(classes=4), InstaHide(k=2)]).inputs(data, context(), 0)
    assert torch.allclose(both.y.sum(1), torch.ones(12))


@pytest.mark.parametrize("k", [2, 4, 6])
def test_instahide_mixes_each_image_with_distinct_others(k):
    mixed = InstaHide(k=k, classes=40).inputs(telling(40), context(), 0)
    used = coefficients(mixed).abs() > 1e-6
    assert (used.sum(1) == k).all()
    assert used.diagonal().all()


def test_instahide_chooses_every_set_of_others_equally_often():
    """2 of 4 others, 5 images in each of 600 rounds: 3,000 sets over 6 pairs, χ²."""
    counts = dict.fromkeys(combinations(range(4), 2), 0)
    for number in range(600):
        used = InstaHide(k=3, classes=5).inputs(telling(5), context(number), 0).y > 0
        for i, row in enumerate(used):
            others = [j - (j > i) for j in row.nonzero()[:, 0].tolist() if j != i]
            counts[tuple(others)] += 1
    assert sum(counts.values()) == 3000
    assert stats.chisquare(list(counts.values())).pvalue > LEAST_P


@pytest.mark.parametrize(("k", "c1"), [(2, 0.65), (3, 0.5), (4, 0.65), (4, 1.0)])
def test_instahide_coefficients_are_uniform_on_the_bounded_simplex(k, c1):
    """The coefficient of an image in its own mixture, over 1,000 of them. With density 1 on the simplex,
    P(λ > c) = (1 − c)^(k − 1); for k = 2 that leaves λ uniform on [1 − c₁, c₁]. Otherwise against 20,000
    points of the simplex from NumPy, of which those outside the bound are left out."""
    mixed = InstaHide(k=k, c1=c1, classes=1000).inputs(telling(1000, torch.float64), context(), 0)
    own = mixed.y.diagonal().numpy()
    assert float(mixed.y.max()) <= c1
    points = np.random.default_rng(0).dirichlet(np.ones(k), 20_000)
    inside = points[points.max(1) <= c1]
    assert len(inside) / 20_000 == pytest.approx(allowed_share(k, c1), abs=0.02)
    assert stats.ks_2samp(own, inside[:, 0]).pvalue > LEAST_P
    if k == 2:
        assert stats.kstest(own, stats.uniform(1 - c1, 2 * c1 - 1).cdf).pvalue > LEAST_P


def test_instahide_flips_every_pixel_by_itself_and_no_more():
    """40 white images of 400 pixels in [−1, 1]: each mixture is white but for 16,000 signs: half are −1,
    and no two pixels, of one image or of two, agree more than chance has it (5 standard deviations)."""
    data = Examples(torch.ones(40, 1, 20, 20), torch.arange(40) % 4)
    mixed = InstaHide(low=-1.0, high=1.0, classes=4).inputs(data, context(), 0)
    assert torch.allclose(mixed.x.abs(), torch.ones(()), atol=1e-6)
    flat = mixed.x.sign().flatten(1)
    assert abs(float(flat.mean())) < 5 / 16_000**0.5
    between = flat @ flat.t() / 400 - torch.eye(40)
    assert between.abs().max() < 5 / 400**0.5
    along = (flat[:, 1:] * flat[:, :-1]).mean()
    assert abs(float(along)) < 5 / 16_000**0.5


def test_instahide_is_the_convex_combination_but_for_signs_about_the_middle():
    """Recomputed from the labels: every image has a class of its own, so they are the coefficients."""
    rng = torch.Generator().manual_seed(3)
    data = Examples(2 + 4 * torch.rand(9, 3, 4, 4, generator=rng, dtype=torch.float64), torch.arange(9))
    mixed = InstaHide(low=2.0, high=6.0, classes=9).inputs(data, context(), 0)
    combined = torch.einsum("ij,jchw->ichw", mixed.y, data.x)
    assert torch.allclose((mixed.x - 4).abs(), (combined - 4).abs(), atol=1e-12)
    assert 2 <= mixed.x.min() <= mixed.x.max() <= 6
    assert (mixed.x - combined).abs().max() > 0.5


def test_impossible_options_are_refused():
    with pytest.raises(InputError, match=r"alpha must be a finite number > 0, got 0\.0"):
        Mixup(alpha=0.0)
    with pytest.raises(InputError, match="k must be >= 2, got 1"):
        InstaHide(k=1)
    for c1 in (0.25, 0.26, 1.5, -1.0):
        with pytest.raises(InputError, match=r"c1 must be at most 1 and far enough above 1 / 4"):
            InstaHide(c1=c1)
    with pytest.raises(InputError, match=r"low must be below high, both finite, got \(1\.0, 1\.0\)"):
        InstaHide(low=1.0)
    with pytest.raises(InputError, match="k must be at most the 3 examples of client 7, got 4"):
        InstaHide(classes=4).inputs(images(3), context(), 7)


def soft_loop(model, params, data, local, rngs):
    """ClientUpdate on soft labels as one reads it: −Σ_c y_c log softmax(logits)_c, plain SGD."""
    rows = []
    for d, rng in zip(data, rngs, strict=True):
        nn.utils.vector_to_parameters(params.clone(), model.parameters())
        batches = torch.from_numpy(rng.permutation(len(d))).split(local.batch or len(d))
        for b in batches * local.epochs:
            loss = -(d.y[b] * model(d.x[b]).log_softmax(1)).sum(1).mean()
            found = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), found, strict=True):
                    p -= local.lr * g
        rows.append(Layout.of(model).row(model) - params)
    return torch.stack(rows)


SOFT = {"2nn": (1, 8, 8), "softmax": (1, 8, 8), "cnn": (1, 8, 8), "lenet": (3, 8, 8)}
ANY_MODEL = ("looped", "vmapped", "graphed")


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("net", SOFT)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_train_on_soft_labels_or_say_that_they_cannot(engine, net, name):
    shape, local = SOFT[net], LocalSpec(2, 4, 0.1)
    model = models.build(net, shape, 4, torch.Generator().manual_seed(1))
    if ENGINES[engine].refuses(model, cross_entropy, shape):
        pytest.skip(f"{engine} does not train {net}")
    rng, defense = torch.Generator().manual_seed(2), type(DEFENSES[name])(classes=4)
    data = [
        Examples(torch.rand(n, *shape, generator=rng), torch.randint(4, (n,), generator=rng))
        for n in (7, 4, 9)
    ]
    data = [defense.inputs(d, context(), c) for c, d in enumerate(data)]
    params = Layout.of(model).row(model)
    rngs = [[np.random.default_rng(k) for k in range(3)] for _ in range(2)]
    try:
        rows = choose(model, cross_entropy, shape, engine)(params, data, local, rngs[0])
    except (ValueError, RuntimeError):
        assert engine not in ANY_MODEL
        return
    expected = soft_loop(model, params, data, local, rngs[1])
    assert expected.abs().max() > 1e-3
    assert (rows - expected).abs().max() / expected.abs().max() < 1e-4
