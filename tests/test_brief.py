"""Training in bfloat16 against a plain loop that rounds before every product, in double precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fltoolkit import models
from fltoolkit.defense import DefenseStack
from fltoolkit.loss import cross_entropy
from fltoolkit.models.text import LanguageModel, PeepholeLstm
from fltoolkit.training.engines import brief, choose, looped, native
from fltoolkit.training.evaluate import evaluate
from fltoolkit.training.task import Task
from fltoolkit.types import Examples, Layout, LocalSpec

compiled = pytest.mark.skipif(native.library() is None, reason="no C compiler")
CHANNELS_LAST = {"memory_format": torch.channels_last}
SHORT = LocalSpec(2, None, 0.1, precision="bf16")


class Rounded(torch.autograd.Function):
    """A tensor in bfloat16, and its gradient too."""

    @staticmethod
    def forward(ctx, t):
        return t.bfloat16().to(t.dtype)

    @staticmethod
    def backward(ctx, d):
        return d.bfloat16().to(d.dtype)


class Slow(nn.Module):
    """A chain of layers in double precision whose products round what goes in and what comes out."""

    def __init__(self, chain, kinds=(nn.Conv2d, nn.Linear)):
        super().__init__()
        self.chain, self.kinds = chain.double(), kinds

    def forward(self, x):
        x = x.double()
        for layer in self.chain:
            if isinstance(layer, self.kinds):
                inputs = [Rounded.apply(t) for t in (x, layer.weight, layer.bias)]
                product = F.linear(*inputs) if isinstance(layer, nn.Linear) else layer._conv_forward(*inputs)
                x = Rounded.apply(product)
            else:
                x = layer(x)
        return x


def chain(seed=0):
    """Both kinds of convolutions, one of them followed by its pooling; 33 channels: a vector and one."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(2, 33, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(33, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 2 * 2, 7), nn.Tanh(), nn.Linear(7, 4)),
    )


def examples(count, shape=(2, 9, 9), seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=rng)
    return Examples(x, torch.randint(4, (count,), generator=rng))


def distance(found, expected):
    return float(((found - expected).norm() / expected.norm()).detach())


@compiled
@pytest.mark.parametrize(("channels", "height", "width"), [(32, 4, 6), (33, 5, 4), (7, 2, 9), (70, 6, 2)])
def test_pooling_is_that_of_torch(channels, height, width):
    torch.manual_seed(0)
    z = torch.randn(3, channels, height, width).bfloat16().contiguous(**CHANNELS_LAST)
    expected = F.max_pool2d(F.relu(z.float().requires_grad_()), 2)
    y, which = native.relu_pool(z)
    assert torch.equal(y.float(), expected)
    d = torch.randn_like(y)
    below = native.unpool(d, which, height, width)
    whole = z.float().requires_grad_()
    F.max_pool2d(F.relu(whole), 2).backward(d.float())
    assert torch.equal(below.float(), whole.grad)
    assert 0 < float((below != 0).float().mean()) < 0.3


@compiled
def test_of_equal_maxima_the_first_has_the_gradient_and_zero_has_none():
    z = torch.zeros(1, 40, 2, 4, dtype=torch.bfloat16).contiguous(**CHANNELS_LAST)
    z[..., 2:] = 3.0
    y, which = native.relu_pool(z)
    assert torch.equal(y[0, 39], torch.tensor([[0.0, 3.0]]).bfloat16())
    assert torch.equal(which[0, 39], torch.tensor([[4, 0]], dtype=torch.int16))


@compiled
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0xFFC0 - 2**16, 0xFF81 - 2**16, -1])
def test_nan_is_not_pooled_away_whatever_its_sign(bits):
    z = torch.full((1, 33, 2, 4), -3.0).bfloat16().contiguous(**CHANNELS_LAST)
    z[..., 3] = float("-inf")
    z[:, :, 1, 1] = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)
    y, which = native.relu_pool(z)
    assert y[..., 0].isnan().all()
    assert (y[..., 1] == 0).all()
    assert [set(which[..., i].flatten().tolist()) for i in range(2)] == [{3}, {4}]


@compiled
@pytest.mark.parametrize(
    ("channels", "kernel", "padding"),
    [(1, (5, 5), (2, 2)), (2, (4, 3), (1, 0)), (3, (3, 3), (0, 1)), (1, (2, 6), (1, 3))],
)
def test_small_filters_gradient_is_that_of_torch_in_double_precision(channels, kernel, padding):
    torch.manual_seed(0)
    x = torch.randn(3, channels, 8, 9).bfloat16().contiguous(**CHANNELS_LAST)
    weight, bias = (torch.randn(s).bfloat16() for s in ((32, channels, *kernel), (32,)))
    assert native.few(weight)
    z = F.conv2d(x, weight, bias, padding=padding).contiguous(**CHANNELS_LAST)
    y, which = native.relu_pool(z)
    d = torch.randn_like(y)
    found = native.conv_pool_grad(x, weight, d, which, padding)
    exact = [t.double().requires_grad_() for t in (weight, bias)]
    out = F.conv2d(x.double(), *exact, padding=padding)
    below = native.unpool(d, which, *z.shape[2:]).double()
    for mine, theirs in zip(found, torch.autograd.grad(out, exact, below), strict=True):
        assert mine.dtype == torch.float32
        assert distance(mine, theirs) < 1e-6


def test_numbers_that_stay_rounded_between_layers_are_the_same():
    data, seen = examples(40), []
    for stays in (True, False):
        net = chain()
        net[4] = nn.ReLU()
        brief.shorten(net, {"", "0", "3", "6"}, brief.FROM)
        layers = [m for m in net.modules() if isinstance(m, brief._Brief)]
        assert [m.stays for m in layers] == [True, True, False, False], "a Tanh comes after the third"
        for layer in layers:
            layer.stays = layer.stays and stays
        y = net(data.x)
        seen.append((y, *torch.autograd.grad(cross_entropy(y, data.y).sum(), list(net.parameters()))))
    for mine, theirs in zip(*seen, strict=True):
        assert torch.equal(mine, theirs)


def test_a_layer_called_twice_gives_float32():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    brief.shorten(net, {"", "2"}, brief.FROM)
    assert net[0](torch.ones(2, 4)).dtype == torch.float32


def test_layers_of_a_list_give_float32():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    brief.shorten(net, {"0", "1", "2"}, brief.FROM)
    assert net[0](torch.ones(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=compiled), False])
def test_layers_compute_what_rounding_before_each_product_gives(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    fast, slow, data = chain(), Slow(chain()), examples(40)
    brief.shorten(fast, {"", "0", "1", "2"}, brief.FROM)
    assert isinstance(fast[1], nn.Identity)
    x, twin = data.x.clone().requires_grad_(), data.x.clone().requires_grad_()
    y, expected = fast(x), slow(twin)
    assert y.dtype == torch.float32
    assert distance(y, expected) < 2e-3 < distance(y, chain()(data.x))
    mine = torch.autograd.grad(cross_entropy(y, data.y).sum(), [x, *fast.parameters()])
    theirs = torch.autograd.grad(cross_entropy(expected, data.y).sum(), [twin, *slow.parameters()])
    assert max(map(distance, mine, theirs)) < 1e-2
    assert all(p.dtype == torch.float32 for p in fast.parameters())


def trained(net, local, data, monkeypatch, piece=brief.PIECE):
    monkeypatch.setattr(brief, "PIECE", piece)
    rngs = [np.random.default_rng(k) for k in range(len(data))]
    engine = looped.Looped(net, cross_entropy)
    return engine(Layout.of(net).row(net), data, local, rngs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_clients_steps_are_those_of_a_loop_that_rounds(momentum, monkeypatch):
    local, data = replace(SHORT, momentum=momentum), [examples(70), examples(90, seed=1)]
    slow = Slow(chain())
    expected = trained(slow, replace(local, precision="float32"), data, monkeypatch)
    for piece in (brief.PIECE, 50):
        found = trained(chain(), local, data, monkeypatch, piece)
        assert distance(found, expected) < 1e-2
        assert found.dtype == torch.float32


@pytest.mark.parametrize("batch", [brief.FROM[nn.Conv2d] - 1, brief.FROM[nn.Conv2d], brief.FROM[nn.Linear]])
def test_small_batches_round_what_pays(batch, monkeypatch):
    local, data = LocalSpec(1, batch, 0.1, precision="bf16"), [examples(90)]
    dense = nn.Sequential(nn.Flatten(), nn.Linear(162, 8), nn.ReLU(), nn.Linear(8, 4))
    for net, kind in ((chain(), nn.Conv2d), (dense, nn.Linear)):
        found = trained(net, local, data, monkeypatch)
        expected = trained(net, replace(local, precision="float32"), data, monkeypatch)
        assert torch.equal(found, expected) == (batch < brief.FROM[kind])
        assert distance(found, expected) < 2e-2


def test_beside_linear_layers_in_float32_convolutions_compute_what_rounding_gives(monkeypatch):
    local, data = LocalSpec(2, brief.FROM[nn.Conv2d], 0.1, precision="bf16"), [examples(70)]
    found = trained(chain(), local, data, monkeypatch)
    slow = Slow(chain(), (nn.Conv2d,))
    expected = trained(slow, replace(local, precision="float32"), data, monkeypatch)
    all_rounded = trained(Slow(chain()), replace(local, precision="float32"), data, monkeypatch)
    assert distance(found, expected) < 1e-2
    assert distance(found, expected) < distance(found, all_rounded)


@pytest.mark.parametrize(("name", "off"), [("2nn", 0.1), ("cnn", 0.1), ("lenet", 0.1), ("resnet18", 0.4)])
def test_models_train_and_are_evaluated_nearly_as_in_float32(name, off):
    """BatchNorm makes much of a little: PyTorch's own autocast is 0.3 off on this ResNet."""
    net = models.build(name, (1, 16, 16), 4, torch.Generator().manual_seed(0))
    found, data = [], examples(64, (1, 16, 16))
    for precision in ("float32", "bf16"):
        local = LocalSpec(1, None, 0.05, precision=precision)
        task = Task(net, cross_entropy, local, DefenseStack([]), 0)
        engine = choose(net, cross_entropy, (1, 16, 16), "looped")
        params = Layout.of(net).row(net)
        delta = engine(params, [data], local, [np.random.default_rng(0)])[0]
        found.append((delta, evaluate(task, params, data)))
    (whole, exact), (short, near) = found
    assert 0 < distance(short, whole) < off
    assert exact.loss != near.loss == pytest.approx(exact.loss, rel=0.02)
    assert exact.total == near.total == 64


@pytest.mark.parametrize(
    ("batch", "tokens", "kinds"),
    [
        (1, 1, {PeepholeLstm}),
        (8, 1, {PeepholeLstm, nn.Conv2d}),
        (3, 10, {PeepholeLstm, nn.Conv2d}),
        (4, 8, {PeepholeLstm, nn.Conv2d, nn.Linear}),
        (None, 1, {PeepholeLstm, nn.Conv2d, nn.Linear}),
    ],
)
def test_a_line_counts_as_its_tokens(batch, tokens, kinds):
    local, label = LocalSpec(1, batch, 0.1, precision="bf16"), torch.zeros(tokens)
    assert set(brief.layers(local, label)) == kinds
    assert not brief.layers(replace(local, precision="float32"), label)


@pytest.mark.parametrize("units", [64, 16])
def test_language_models_train_and_are_evaluated_nearly_as_in_float32(units, monkeypatch):
    """Batches of two lines of nine tokens: LSTMs alone are rounded, if tiles fit them; of four, all is."""
    net = LanguageModel(7, 3, units, 2)
    for k, layer in enumerate(net.layers):
        layer.reset(torch.Generator().manual_seed(k))
    rng = torch.Generator().manual_seed(9)
    data, found = Examples(*torch.randint(6, (2, 8, 9), generator=rng)), {}
    for batch, precision in ((2, "float32"), (2, "bf16"), (4, "float32"), (4, "bf16")):
        local = LocalSpec(2, batch, 0.5, precision=precision)
        task = Task(net, cross_entropy, local, DefenseStack([]), 0)
        found[batch, precision] = trained(net, local, [data], monkeypatch)
        found[precision] = evaluate(task, Layout.of(net).row(net), data)
    for batch in (2, 4):
        off = distance(found[batch, "bf16"], found[batch, "float32"])
        assert off < 1e-2
        assert (off > 1e-5) == (batch == 4 or (units == 64 and native.tiles()))
    assert found["float32"].loss != found["bf16"].loss == pytest.approx(found["float32"].loss, rel=1e-3)
