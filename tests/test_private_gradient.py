"""The clipped sum of DP-SGD against a loop that takes one example at a time."""

from __future__ import annotations

from copy import deepcopy
from math import nan

import pytest
import torch
from conftest import tiny_examples, tiny_model
from torch import nn
from torch.nn import functional as F

from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.models import build
from fltoolkit.training.private import clipped, layers, norms
from fltoolkit.training.private.clipped import check_private, clipped_sum, per_example_rows
from fltoolkit.types import Layout

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of `vmap`, for an LSTM
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
CLASSES, TOKENS, B = 5, 11, 7


def obvious(model, x, y, norm):
    """One example after the other in double precision: the rows `[B, D]` and their clipped sum `[D]`."""
    model = deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    params = [p for p in model.parameters() if p.requires_grad]
    found, total = [], torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    for i in range(len(x)):
        loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])[0]
        parts = torch.autograd.grad(loss, params, allow_unused=True)
        g = torch.cat(
            [torch.zeros(p.numel()) if v is None else v.flatten() for v, p in zip(parts, params, strict=True)]
        )
        total += g * min(1.0, norm / max(float(g.norm()), 1e-300))
        found.append(g)
    return torch.stack(found), total


class Centred(nn.Module):
    """Takes the batch's mean off every example, outside of any layer that is known to do so."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(9, CLASSES)

    def forward(self, x):
        return self.out(x - x.mean(0))


@pytest.mark.parametrize("make", [Centred, lambda: nn.Sequential(nn.Linear(9, CLASSES), nn.Softmax(0))])
def test_examples_that_a_model_mixes_have_the_gradients_that_they_have_alone(make):
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(B, 9), torch.arange(B) % CLASSES
    _, expected = obvious(model, x, y, 0.5)
    found, _ = clipped_sum(model, cross_entropy, Layout.of(model), x, y, 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


class Tokens(nn.Module):
    """Means of embedded tokens and positions; the token 0 is padding."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(TOKENS, 6, padding_idx=0), nn.Embedding(9, 6)
        self.norm, self.hidden, self.out = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        places = torch.arange(x.shape[1]).expand(x.shape)
        h = torch.tanh(self.hidden(self.norm(self.words(x) + self.places(places))))
        return self.out(h.mean(1))


class Sequence(nn.Module):
    """Two linear layers on each of an example's places, so that both kinds of norm are met."""

    def __init__(self, wide=40, batch_first=True):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 3), nn.Linear(3, wide), nn.Linear(wide, CLASSES)
        self.c, self.batch_first = nn.Linear(wide, wide), batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        h = self.c(torch.relu(self.b(self.a(x))))
        return self.out(h.mean(1 if self.batch_first else 0))


class Shared(nn.Module):
    """One layer used twice, or one weight in two layers, or a weight used beside its layer."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.how = how
        if how == "weight":
            self.b.weight = self.a.weight

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.how == "layer":
            h = torch.tanh(self.a(h))
        if self.how == "beside":
            h = h + F.linear(x, self.a.weight)
        if self.how == "instead":
            self.a(x)
            h = torch.tanh(F.linear(x, self.a.weight, self.a.bias))
        return self.out(self.b(h))


class Bare(nn.Module):
    """A parameter that no layer owns."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.randn(6)), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(x * self.scale)


class Places(nn.Module):
    """Embedded places without a dimension for examples, as many places as there are examples."""

    def __init__(self):
        super().__init__()
        self.places, self.out = nn.Embedding(B, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out((x + self.places(torch.arange(B))).mean(1))


class Deciding(Bare):
    """Not for `vmap`: it asks what a number is."""

    def forward(self, x):
        h = torch.stack([v if float(v.sum()) > 0 else torch.tanh(v) for v in x])
        return super().forward(h)


class Recurrent(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Mean(nn.Module):
    """Over the places of each example."""

    def forward(self, x):
        return x.mean(1)


def strided():
    """Strides, paddings, dilations and groups, not the same in both directions."""
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 5), stride=(2, 1), padding=(1, 2), bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, dilation=(1, 2), padding="same", groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, stride=2, padding="valid", groups=2),
        nn.Flatten(),
        nn.Linear(8 * 2 * 5, CLASSES),
    )


def deep():
    """Convolutions with few places and many channels, where the Gram norm is cheaper."""
    return nn.Sequential(
        nn.Conv2d(2, 24, 3, stride=4, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(32 * 4, CLASSES),
    )


def normalised():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.LayerNorm(4 * 8 * 8),
        nn.Linear(4 * 8 * 8, CLASSES),
    )


def lines():
    """One and three dimensions."""
    one = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 5, stride=2), nn.Flatten(2))
    return nn.Sequential(nn.Flatten(2), one, nn.Flatten(), nn.Linear(3 * 70, CLASSES))


def volume():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 3, (2, 3, 3), stride=2), nn.Flatten(), nn.Linear(75, CLASSES)
    )


def frozen_statistics():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, CLASSES))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def partly_frozen():
    model = normalised()
    for p in (model[0].weight, model[3].bias, model[4].weight, model[6].bias):
        p.requires_grad_(False)
    return model


def images(*shape):
    return lambda: torch.randn(B, *shape)


def tokens():
    return torch.randint(TOKENS, (B, 9)) * (torch.rand(B, 9) > 0.3)


def known(name, *shape):
    return lambda: build(name, shape, CLASSES, torch.Generator().manual_seed(1))


FAST = {
    "2nn": (known("2nn", 1, 12, 12), images(1, 12, 12)),
    "in-place": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES)),
        images(6),
    ),
    "cnn": (known("cnn", 1, 12, 12), images(1, 12, 12)),
    "lenet": (known("lenet", 3, 12, 12), images(3, 12, 12)),
    "group-norm": (normalised, images(2, 12, 12)),
    "text": (Tokens, tokens),
    "strided": (strided, images(2, 12, 12)),
    "deep": (deep, images(2, 12, 12)),
    "lines": (lines, images(2, 12, 12)),
    "volume": (volume, images(2, 12, 12)),
    "sequence": (Sequence, images(9, 6)),
    "frozen-statistics": (frozen_statistics, images(2, 12, 12)),
    "partly-frozen": (partly_frozen, images(2, 12, 12)),
}
SLOW = {
    "shared-layer": (lambda: Shared("layer"), images(6)),
    "shared-weight": (lambda: Shared("weight"), images(6)),
    "beside": (lambda: Shared("beside"), images(6)),
    "instead": (lambda: Shared("instead"), images(6)),
    "bare": (Bare, images(6)),
    "deciding": (Deciding, images(6)),
    "places": (Places, images(B, 6)),
    "sequence-first": (lambda: Sequence(batch_first=False), images(B, 6)),
    "recurrent": (Recurrent, images(5, 6)),
    "reflecting": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(108, CLASSES)
        ),
        images(2, 6, 6),
    ),
    "uneven": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, (2, 3), padding="same"), nn.Flatten(), nn.Linear(108, CLASSES)),
        images(2, 6, 6),
    ),
    "frequency": (
        lambda: nn.Sequential(
            nn.Embedding(TOKENS, 6, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(54, CLASSES)
        ),
        tokens,
    ),
    "weight-norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES))),
        images(6),
    ),
}


def scene(name, dtype=torch.float32):
    """A model, its examples and what the loop finds for a norm in the middle of theirs."""
    torch.manual_seed(3)
    make, inputs = (FAST | SLOW)[name]
    model, x, y = make().to(dtype), inputs(), torch.randint(CLASSES, (B,))
    x = x.to(dtype) if x.is_floating_point() else x
    middle = float(obvious(model, x, y, 1.0)[0].norm(dim=1).median())
    return model, x, y, middle


def far(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def no_rows(*_):
    raise AssertionError("the gradients of single examples were asked for")


@pytest.mark.parametrize("share", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", list(FAST))
def test_layers_with_a_rule_give_the_loops_sum(name, share, monkeypatch):
    """All, some and none of the examples are clipped; no row of a single example is made."""
    monkeypatch.setattr(clipped, "per_example_rows", no_rows)
    monkeypatch.setattr(clipped, "PIECE", 4)
    model, x, y, middle = scene(name)
    every, total = obvious(model, x, y, share * middle)
    row, norms = clipped_sum(model, cross_entropy, Layout.of(model), x, y, share * middle)
    assert far(row, total) < 1e-5
    assert far(norms, every.norm(dim=1)) < 1e-5
    acted = int((every.norm(dim=1) > share * middle).sum())
    assert acted == {1e-3: B, 1.0: B // 2, 1e3: 0}[share]


@pytest.mark.parametrize("share", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", list(SLOW))
def test_all_other_models_give_the_loops_sum_too(name, share, monkeypatch):
    asked = []
    count = lambda *a: asked.append(len(a[3])) or per_example_rows(*a)  # noqa: E731
    monkeypatch.setattr(clipped, "per_example_rows", count)
    monkeypatch.setattr(clipped, "ROWS_BYTES", 3 * 4 * Layout.of(scene(name)[0]).size)
    model, x, y, middle = scene(name)
    every, total = obvious(model, x, y, share * middle)
    row, norms = clipped_sum(model, cross_entropy, Layout.of(model), x, y, share * middle)
    assert far(row, total) < 1e-5
    assert far(norms, every.norm(dim=1)) < 1e-5
    assert asked == [3, 3, 1]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_double_precision_is_kept(name):
    model, x, y, middle = scene(name, torch.float64)
    every, total = obvious(model, x, y, middle)
    row, norms = clipped_sum(model, cross_entropy, Layout.of(model), x, y, middle)
    assert far(row, total) < 1e-10
    assert far(norms, every.norm(dim=1)) < 1e-10


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_rows_are_the_loops(name):
    model, x, y, _ = scene(name)
    every, _ = obvious(model, x, y, 1.0)
    assert far(per_example_rows(model, cross_entropy, Layout.of(model), x, y), every) < 1e-5


@pytest.mark.parametrize("name", ["deep", "strided", "cnn", "sequence"])
def test_each_way_to_a_norm_and_a_sum(name, monkeypatch):
    """Gram matrices or gradients; gradients kept or made again; large convolutions one by one or joined."""
    model, x, y, middle = scene(name)
    _, total = obvious(model, x, y, middle)
    for cheaper in (True, False):
        for keep in (0, 1 << 30):
            for large in (0, 1e12):
                for module in (norms, layers):
                    monkeypatch.setattr(module, "gram_is_cheaper", lambda *_, c=cheaper: c)
                monkeypatch.setattr(norms, "KEEP_BYTES", keep)
                monkeypatch.setattr(layers, "LARGE", large)
                row, _ = clipped_sum(model, cross_entropy, Layout.of(model), x, y, middle)
                assert far(row, total) < 1e-5, (cheaper, keep, large)


def test_large_convolutions_go_one_by_one(monkeypatch):
    """FedAvg's second convolution does, its first one does not."""
    copies = []
    weight_gradient = layers._weight_gradient
    spy = lambda *a: copies.append(a[3]) or weight_gradient(*a)  # noqa: E731
    monkeypatch.setattr(layers, "_weight_gradient", spy)
    model = known("cnn", 1, 28, 28)()
    x, y = torch.randn(3, 1, 28, 28), torch.zeros(3).long()
    clipped_sum(model, cross_entropy, Layout.of(model), x, y, 1.0)
    assert copies == [3, 1, 1, 1]


def test_pooling_reads_channels_last(monkeypatch):
    """In chains alone: elsewhere a `view` might not like it."""
    seen = []
    pool = F.max_pool2d
    spy = lambda x, *a, **k: seen.append(x.is_contiguous()) or pool(x, *a, **k)  # noqa: E731
    monkeypatch.setattr(F, "max_pool2d", spy)
    chain = known("cnn", 1, 12, 12)()
    other = nn.ModuleDict({"net": chain})
    other.forward = other["net"].forward
    for model in (chain, other):
        layout, x = Layout.of(model), torch.randn(2, 1, 12, 12)
        clipped_sum(model, cross_entropy, layout, x, torch.zeros(2).long(), 1.0)
    assert seen == [False] * 2 + [True] * 6  # of which four find out whether the model mixes examples


def test_the_cheaper_norm_is_taken():
    assert norms.gram_is_cheaper(4, 108, 16)
    assert not norms.gram_is_cheaper(196, 800, 64)
    assert norms.gram_is_cheaper(10, 40, 41) == (2 * 100 * 81 < 10 * 40 * 41)
    assert norms.gram_is_cheaper(11, 40, 41) == (2 * 121 * 81 < 11 * 40 * 41)


def test_a_gram_norm_survives_cancellation():
    """Two places whose contributions cancel to a ten-thousandth."""
    a, d = torch.randn(1, 1, 50).repeat(1, 2, 1), torch.randn(1, 1, 50).repeat(1, 2, 1)
    d[:, 1] *= -(1 - 1e-4)
    expected = (d[0].double().t() @ a[0].double()).square().sum()
    assert far(norms.gram_squares(a, d), expected) < 1e-5


def test_a_gram_norm_of_nothing_is_not_negative():
    """Contributions that cancel: rounding falls to either side of 0, of which there is no root."""
    a, d = torch.randn(99, 1, 7).repeat(1, 3, 1), torch.randn(99, 3, 7)
    d[:, 2] = -(d[:, 0] + d[:, 1])
    assert float(norms.gram_squares(a, d).min()) >= 0


def test_an_example_without_a_gradient_adds_nothing():
    """Its labels are all zeros, and cross-entropy with a distribution of no mass is 0."""
    model, x, _, _ = scene("2nn")
    y = F.one_hot(torch.randint(CLASSES, (B,)), CLASSES).float()
    y[2] = 0
    row, norms = clipped_sum(model, cross_entropy, Layout.of(model), x, y, 0.1)
    others = [i for i in range(B) if i != 2]
    _, total = obvious(model, x[others], y[others], 0.1)
    assert norms[2] == 0
    assert far(row, total) < 1e-5


@pytest.mark.parametrize("model", [tiny_model(), Bare()], ids=["layers", "rows"])
def test_an_empty_batch_gives_zeros(model):
    layout, x = Layout.of(model), torch.zeros(0, 6)
    row, norms = clipped_sum(model, cross_entropy, layout, x, torch.zeros(0, dtype=torch.int64), 1.0)
    assert torch.equal(row, torch.zeros(layout.size))
    assert norms.shape == (0,)
    assert per_example_rows(model, cross_entropy, layout, x, x).shape == (0, layout.size)


@pytest.mark.parametrize("name", ["cnn", "text", "bare", "sequence"])
def test_one_examples_part_is_within_the_bound(name):
    model, x, y, middle = scene(name)
    for i in range(B):
        bound = 0.3 * middle
        row, _ = clipped_sum(model, cross_entropy, Layout.of(model), x[i : i + 1], y[i : i + 1], bound)
        assert float(row.double().norm()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("name", ["2nn", "bare", "deciding"])
def test_it_works_where_gradients_are_off(name):
    model, x, y, middle = scene(name)
    _, total = obvious(model, x, y, middle)
    with torch.no_grad():
        row, _ = clipped_sum(model, cross_entropy, Layout.of(model), x, y, middle)
    assert far(row, total) < 1e-5


class Breaking(nn.Sequential):
    """A chain that raises at the end of its forward pass."""

    def forward(self, x):
        super().forward(x)
        raise ZeroDivisionError


def state(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    grads = [(p.requires_grad, p.grad is None, p.detach().clone()) for p in model.parameters()]
    return hooks, [m.training for m in model.modules()], [g[:2] for g in grads], [g[2] for g in grads]


@pytest.mark.parametrize("name", ["cnn", "text", "bare", "recurrent", "partly-frozen"])
def test_the_model_is_left_as_it_was(name):
    model, x, y, _ = scene(name)
    next(model.children()).eval()
    before, random = state(model), torch.get_rng_state()
    with torch.no_grad():
        clipped_sum(model, cross_entropy, Layout.of(model), x, y, 1.0)
    after = state(model)
    assert before[:3] == after[:3]
    assert all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_the_model_is_left_as_it_was_after_an_error():
    model = Breaking(nn.Linear(6, CLASSES))
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        clipped_sum(model, cross_entropy, Layout.of(model), torch.randn(B, 6), torch.zeros(B).long(), 1.0)
    assert before[:3] == state(model)[:3]


def test_a_users_hook_counts():
    """It changes a layer's output, so the layer's rule does not hold."""
    model, x, y, middle = scene("2nn")
    handle = model[1].register_forward_hook(lambda _m, _x, z: 2 * z)
    layout = Layout.of(model)
    every = per_example_rows(model, cross_entropy, layout, x, y).double()
    row, _ = clipped_sum(model, cross_entropy, layout, x, y, middle)
    assert far(row, (middle / every.norm(dim=1).clamp_min(middle)) @ every) < 1e-5
    assert list(model[1]._forward_hooks) == [handle.id]


class Overwriting(nn.Module):
    """Changes the first layer's input in place after the layer has read it."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = x.clone()
        z = self.out(self.a(x))
        x.mul_(2)
        return z


def test_an_input_that_changed_meanwhile_is_not_used():
    model = Overwriting()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        clipped_sum(model, cross_entropy, Layout.of(model), torch.randn(B, 6), torch.zeros(B).long(), 1.0)


def test_examples_joined_with_their_places_are_told_apart():
    """The layer sees `[B T, 6]`; the loss takes the places apart again."""

    def loss(logits, y):
        return cross_entropy(logits.view(len(y), 3, -1).mean(1), y)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, CLASSES))
    x, y, layout = torch.randn(B, 3, 6), torch.randint(CLASSES, (B,)), Layout.of(model)
    every, _ = obvious(nn.Sequential(model[1], Mean()), x, y, 1.0)
    row, norms = clipped_sum(model, loss, layout, x, y, 1.0)
    assert far(norms, every.norm(dim=1)) < 1e-5
    assert far(row, (1 / every.norm(dim=1).clamp_min(1)) @ every) < 1e-5


def test_no_gradient_of_a_weight_is_computed(monkeypatch):
    """The backward pass ends at the layers' outputs."""
    reached = []
    model, x, y, _ = scene("2nn")
    for p in model.parameters():
        p.register_hook(lambda g: reached.append(g.shape))
    clipped_sum(model, cross_entropy, Layout.of(model), x, y, 1.0)
    assert reached == []


def test_random_layers_draw_for_each_example():
    """With rows of dropout over equal examples, no two examples have the same norm."""
    for rest in ((), (Bare(),)):
        model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), *(rest or (nn.Linear(6, CLASSES),)))
        x, y = torch.ones(20, 6), torch.zeros(20).long()
        found = clipped_sum(model, cross_entropy, Layout.of(model), x, y, 1.0)[1]
        assert len(found.unique()) > 5


BATCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d]


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_norm_in_training_mode_is_refused(kind):
    layer = kind() if kind is nn.LazyBatchNorm2d else kind(4)
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "bn1": layer})
    with pytest.raises(InputError, match=rf"'bn1' \({kind.__name__}\).*GroupNorm"):
        check_private(model)
    check_private(model.eval())


def test_other_layers_that_mix_or_remember_are_refused():
    with pytest.raises(InputError, match=r"'0'.*GroupNorm"):
        check_private(nn.Sequential(nn.BatchNorm2d(4, affine=False)))
    with pytest.raises(InputError, match=r"'0'.*GroupNorm"):
        check_private(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)).eval())
    with pytest.raises(InputError, match=r"'0'.*track_running_stats"):
        check_private(nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True)))
    check_private(normalised())


def test_clipped_sum_refuses_what_it_cannot_do():
    data = tiny_examples(3)
    mixing = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(25, 4))
    with pytest.raises(InputError, match="BatchNorm2d"):
        clipped_sum(mixing, cross_entropy, Layout.of(mixing), data.x, data.y, 1.0)
    for norm in (0.0, -1.0, nan):
        with pytest.raises(InputError, match="norm must be a finite number > 0"):
            clipped_sum(tiny_model(), cross_entropy, Layout.of(tiny_model()), data.x, data.y, norm)
