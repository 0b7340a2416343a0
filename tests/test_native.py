"""The compiled kernels against PyTorch, and what happens where there is no compiler."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fltoolkit import models
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.models.text import LanguageModel, PeepholeLstm
from fltoolkit.training.engines import choose, native, native_lstm
from fltoolkit.training.engines.base import each_on_its_core
from fltoolkit.training.engines.fused import PooledConv2d, join_with_pool
from fltoolkit.training.engines.native_lstm import Lines
from fltoolkit.training.engines.recurrent import FastLstm
from fltoolkit.types import Examples, Layout, LocalSpec

compiled = pytest.mark.skipif(native.library() is None, reason="no C compiler")
CHANNELS_LAST = {"memory_format": torch.channels_last}

SIZES = [(1, 1, 1), (4, 8, 3), (5, 16, 4), (10, 24, 10), (41, 70, 13), (83, 129, 21), (10, 4100, 27)]
"""Rows n, inputs, outputs: less and more than a tile, a vector and a block."""


def near(a, b):
    a, b = a.detach(), b.detach()
    return (a - b).abs().max() <= 2e-6 * max(1.0, float(b.abs().max()))


@compiled
@pytest.mark.parametrize(("n", "inputs", "outputs"), SIZES)
def test_products_are_those_of_torch(n, inputs, outputs):
    g = torch.Generator().manual_seed(n)
    x, w, d = (torch.rand(s, generator=g) for s in ((n, inputs), (outputs, inputs), (n, outputs)))
    b = torch.rand(outputs, generator=g)
    assert near(native.forward(x, w, b), F.linear(x, w, b))
    assert near(native.forward(x, w, None), F.linear(x, w))
    assert near(native.below(d, w), d @ w)
    stepped, bias = w.clone(), b.clone()
    native.step(d, x, stepped, bias, 0.5, -0.25)
    assert near(stepped, 0.5 * w - 0.25 * d.T @ x)
    assert near(bias, 0.5 * b - 0.25 * d.sum(0))


def recurrence(steps, n, units):
    """A peephole layer whose weights are all large enough to show, its input, a gradient by its output."""
    g = torch.Generator().manual_seed(units)
    layer = PeepholeLstm(3, units)
    layer.reset(g)
    with torch.no_grad():
        layer.peephole *= 5
        layer.hidden_weight *= 3
    return layer, torch.randn(n, steps, 3, generator=g), torch.randn(n, steps, units, generator=g)


SHORT = pytest.param(True, marks=pytest.mark.skipif(not native.tiles(), reason="no tiles of bfloat16"))


@compiled
@pytest.mark.parametrize("short", [False, SHORT])
@pytest.mark.parametrize(
    ("steps", "n", "units"), [(1, 1, 64), (6, 4, 128), (3, 5, 64), (5, 13, 192), (9, 37, 64)]
)
def test_an_lstm_is_its_equations_forward_and_backward(steps, n, units, short):
    """Against autograd through the plain layer in double precision."""
    layer, x, dh = recurrence(steps, n, units)
    exact, twin = copy.deepcopy(layer).double(), x.double().requires_grad_()
    expected = exact(twin)
    theirs = torch.autograd.grad(expected, [twin, *exact.parameters()], dh.double())

    layer.__class__, layer.short = FastLstm, short
    h = layer(x.requires_grad_())
    mine = torch.autograd.grad(h, [x, *layer.parameters()], dh)
    off = [distance(a, b) for a, b in zip((h, *mine), (expected, *theirs), strict=True)]
    assert max(off) < (2e-2 if short else 2e-6)
    assert not short or min(off) > 1e-4
    assert all(m.dtype == torch.float32 for m in (h, *mine))


def distance(found, expected):
    """Largest difference, as a share of the largest value."""
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


@compiled
@pytest.mark.parametrize("units", [16, 48, 80])
def test_an_lstm_may_have_any_number_of_whole_vectors(units):
    layer, x, dh = recurrence(4, 6, units)
    expected = torch.autograd.grad(layer(x), list(layer.parameters()), dh)
    layer.__class__ = FastLstm
    found = torch.autograd.grad(layer(x), list(layer.parameters()), dh)
    assert all(distance(a, b) < 5e-6 for a, b in zip(found, expected, strict=True))


@compiled
@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize("short", [False, SHORT])
def test_lines_that_end_early_are_as_if_each_were_alone(short, more):
    """Lines of many lengths, more than a tile has rows, in one call, with rows of no line behind them."""
    lengths = [9, 9, 9, 9, 8, 8, 7, 7, 7, 7, 6, 6, 5, 5, 4, 4, 4, 3, 3, 3, 2, 1, 1, 1, 1, 1, 0, 0]
    layer, x, dh = recurrence(9, len(lengths), 64)
    layer.__class__, layer.short = FastLstm, short
    params = list(layer.parameters())
    each = [layer(x[k : k + 1, :n])[0] for k, n in enumerate(lengths) if n]
    kept = torch.arange(9) < torch.tensor(lengths)[:, None]
    expected = torch.autograd.grad(torch.cat(each), params, dh[kept])

    there = kept.T
    lines = Lines(len(lengths), there.sum(1))
    beyond = torch.full((more, 3), 1.5)
    rows = torch.cat([x.transpose(0, 1)[there], beyond]).requires_grad_()
    h = layer.on_rows(rows, lines)
    assert torch.equal(h[lines.rows :], torch.zeros(more, 64))
    together = h.new_zeros(9, len(lengths), 64).index_put(torch.where(there), h[: lines.rows])
    for k, alone in enumerate(each):
        assert distance(together[: lengths[k], k], alone) < 1e-6
    by_h = torch.cat([dh.transpose(0, 1)[there], torch.full((more, 64), 1.5)])
    by_rows, *found = torch.autograd.grad(h, [rows, *params], by_h)
    assert all(distance(a, b) < (2e-2 if short else 2e-6) for a, b in zip(found, expected, strict=True))
    assert torch.equal(by_rows[lines.rows :], torch.zeros(more, 3))


@compiled
@pytest.mark.skipif(not native.tiles(), reason="no tiles of bfloat16")
def test_recurrent_products_in_tiles_are_exact_but_for_rounding_their_factors():
    """Against the same kernel in float32, given weights and states that are whole in bfloat16."""
    n, units = 21, 64
    g = torch.Generator().manual_seed(0)
    u = (torch.randint(-8, 9, (4 * units, units), generator=g) / 256).float()
    wx, lines = torch.randn(2 * n, 4 * units, generator=g).bfloat16(), Lines.alike(n, 2)
    bias, peephole = torch.randn(4 * units, generator=g), torch.randn(3 * units, generator=g)
    (gates, cells, squashed), hidden, states = native_lstm.run(wx, u, bias, peephole, lines)
    assert torch.equal(states[n:], hidden.bfloat16())
    assert torch.equal(states[:n], torch.zeros(n, units, dtype=torch.bfloat16))

    second = wx[n:].float() + states[n : 2 * n].float() @ u.T
    (alone, cell, squash), *_ = native_lstm.run(
        torch.cat([wx[:n].float(), second]), torch.zeros_like(u), bias, peephole, lines
    )
    pairs = ((gates, alone), (cells, cell), (squashed, squash))
    assert all(distance(a, b.double()) < 1e-6 for a, b in pairs)

    given = torch.randn(2 * n, units, generator=g), u, peephole, lines, gates, cells, squashed
    dwx, by_bias, by_peephole = native_lstm.run_back(*given, dtype=torch.bfloat16)
    full = native_lstm.run_back(*given, dtype=torch.float32)
    assert distance(dwx[n:].float(), full[0][n:].bfloat16().double()) == 0
    for a, b in ((dwx, full[0]), (by_bias, full[1]), (by_peephole, full[2])):
        assert 0 < distance(a, b.double()) < 4e-3


@compiled
@pytest.mark.skipif(not native.tiles(), reason="no tiles of bfloat16")
def test_tiles_are_left_as_they_were():
    """PyTorch's products in bfloat16 use the same tiles before and after."""
    a = torch.randn(70, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = a @ a.T
    none = torch.zeros(256, 64)
    native_lstm.run(a.new_zeros(6, 256), none, none[:, 0], none[:192, 0], Lines.alike(3, 2))
    assert torch.equal(a @ a.T, before)


@compiled
@pytest.mark.parametrize(("units", "calls"), [(16, 6), (24, 0)])
def test_layers_of_whole_vectors_run_natively(units, calls, monkeypatch):
    net, called = LanguageModel(7, 3, units, 2), []
    for layer in net.layers:
        layer.reset(torch.Generator().manual_seed(0))
    run = native_lstm.run
    monkeypatch.setattr(native_lstm, "run", lambda *given: (called.append(1), run(*given))[1])
    data = [Examples(torch.randint(6, (5, 9)), torch.randint(6, (5, 9)))]
    engine = choose(net, cross_entropy, (9,), "looped")
    engine(Layout.of(net).row(net), data, LocalSpec(1, 2, 0.1), [np.random.default_rng(0)])
    assert len(called) == calls


@compiled
def test_gates_are_right_to_the_last_digits_and_keep_nan():
    """One step without recurrence: σ and tanh of numbers small, large and absurd."""
    sizes = torch.logspace(-30, 2.5, 160)
    z = torch.cat([sizes, -sizes, torch.zeros(1), torch.tensor([float("inf"), -float("inf"), float("nan")])])
    z = F.pad(z, (0, -len(z) % 16))
    units = len(z)
    wx, none = z.repeat(1, 4), torch.zeros(4 * units)
    u, lines = torch.zeros(4 * units, units), Lines.alike(1, 1)
    (gates, *_), *_ = native_lstm.run(wx, u, none, none[: 3 * units], lines)
    exact = z.double()
    for found, right in zip(gates[0], [torch.sigmoid(exact)] * 3 + [torch.tanh(exact)], strict=True):
        assert torch.equal(found.isnan(), z.isnan())
        there = (~z.isnan()) & (right.abs() > 1e-37)
        assert ((found.double() - right).abs() <= 2e-7 * right.abs())[there].all()
        assert (found.abs() <= 2e-37)[right.abs() <= 1e-37].all()


@compiled
@pytest.mark.parametrize("channels", [(1, 32), (32, 48), (3, 5), (20, 7)])
@pytest.mark.parametrize(("kernel", "padding", "side"), [(5, 2, 8), (3, 0, 9), ((1, 2), (0, 1), 7)])
def test_a_convolution_with_its_pooling_is_that_of_torch(channels, kernel, padding, side):
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, kernel, padding=padding)
    if channels[0] > 1:  # of one channel, memory is both channels-last and not
        conv.to(**CHANNELS_LAST)
    chain = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(3, channels[0], side, side).contiguous(**CHANNELS_LAST).requires_grad_()
    found = []
    for joined in (False, True):
        if joined:
            join_with_pool(chain, {"", "0", "1", "2"})
            assert isinstance(chain[0], PooledConv2d)
        y = chain(x)
        weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
        found.append([y, *torch.autograd.grad((weights * y).sum(), [x, *conv.parameters()])])
    assert float(found[0][0].detach().abs().max()) > 0.1
    assert all(near(ours, theirs) for theirs, ours in zip(*found, strict=True))


@compiled
def test_of_equal_maxima_the_first_has_the_gradient_and_zero_has_none():
    z = torch.zeros(1, 16, 2, 4).contiguous(**CHANNELS_LAST)
    z[..., 2:] = 3.0
    y, which = native.relu_pool(z)
    assert torch.equal(y[0, 0], torch.tensor([[0.0, 3.0]]))
    assert torch.equal(which[0, 0], torch.tensor([[4, 0]], dtype=torch.int32))


@compiled
@pytest.mark.parametrize("places", [[0], [1], [2], [3], [0, 1, 2, 3]])
def test_nan_is_not_pooled_away(places):
    """In a vector of channels and in what is left of one."""
    z = torch.ones(1, 17, 2, 2)
    z.view(17, 4)[:, places] = torch.nan
    y, which = native.relu_pool(z.contiguous(**CHANNELS_LAST))
    assert y.isnan().all()
    assert (which == 4).all()


def test_only_what_the_kernel_computes_is_joined():
    def chain(conv, pool, relu=None):
        layers = nn.Sequential(conv, relu or nn.ReLU(), pool)
        join_with_pool(layers, {"", "0", "1", "2"})
        return type(layers[0])

    plain, half = nn.Conv2d(2, 2, 3), nn.MaxPool2d(2)
    assert chain(plain, half) is PooledConv2d
    for conv in (
        nn.Conv2d(2, 2, 3, stride=2),
        nn.Conv2d(2, 2, 3, dilation=2),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 2, 3, padding="same"),
    ):
        assert chain(conv, half) is nn.Conv2d
    for pool in (nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.AvgPool2d(2)):
        assert chain(nn.Conv2d(2, 2, 3), pool) is nn.Conv2d
    assert chain(nn.Conv2d(2, 2, 3), half, nn.Tanh()) is nn.Conv2d
    for left_out in ("", "0", "1", "2"):
        layers = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), half)
        join_with_pool(layers, {"", "0", "1", "2"} - {left_out})
        assert type(layers[0]) is nn.Conv2d


def cohort(shape=(1, 8, 8)):
    g = torch.Generator().manual_seed(0)
    return [Examples(torch.rand(n, *shape, generator=g), torch.arange(n) % 4) for n in (45, 1, 30)]


@pytest.mark.parametrize("name", ["2nn", "cnn"])
def test_without_kernels_the_numbers_are_the_same(name, monkeypatch):
    net = models.build(name, (1, 8, 8), 4, torch.Generator().manual_seed(0))
    row, local, rows = Layout.of(net).row(net), LocalSpec(2, 7, 0.1), []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(native, "library", lambda: None)
        engine = choose(net, cross_entropy, (1, 8, 8))
        rows.append(engine(row, cohort(), local, [np.random.default_rng(k) for k in range(3)]))
    assert engine.name == {"2nn": "batched", "cnn": "looped"}[name]
    assert rows[1].abs().max() > 1e-2
    assert (rows[0] - rows[1]).abs().max() < 1e-4 * rows[1].abs().max()


@compiled
def test_an_engine_says_why_it_cannot_have_kernels(monkeypatch):
    net = models.build("2nn", (4,), 2, torch.Generator())
    assert choose(net, cross_entropy, (4,)).name == "compiled"
    with pytest.raises(InputError, match="not float32 on a CPU"):
        choose(net.double(), cross_entropy, (4,), "compiled")
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(
        InputError, match="no C compiler that can build its kernels, or FLTOOLKIT_NATIVE is 0"
    ):
        choose(net.float(), cross_entropy, (4,), "compiled")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`native.library` as a new process finds it, with an empty cache."""
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native, "user_cache_path", lambda *_, **__: tmp_path)
    return native.library.__wrapped__


@compiled
def test_kernels_are_compiled_once_and_leave_nothing_else(fresh, tmp_path, monkeypatch):
    assert fresh() is not None
    (made,) = tmp_path.iterdir()
    assert made.suffix == ".so"
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert fresh() is not None


def test_switched_off_without_compiler_or_when_it_fails_there_are_no_kernels(fresh, tmp_path, monkeypatch):
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    assert fresh() is None
    assert [p.name for p in tmp_path.iterdir()] == ["cc"]
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    assert fresh() is None
    monkeypatch.undo()
    monkeypatch.setenv(native.SWITCH, "0")
    assert fresh() is None


def test_the_switch_reaches_the_engines():
    code = (
        "import torch; from fltoolkit import models, loss; from fltoolkit.training.engines import choose;"
        "print(choose(models.build('2nn', (4,), 2, torch.Generator()), loss.cross_entropy, (4,)).name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={native.SWITCH: "0"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "batched"


def test_work_is_shared_with_other_threads_and_its_errors_come_back():
    before, seen = torch.get_num_threads(), {}
    both = threading.Barrier(2, timeout=20)

    def work(item):
        seen[item] = (threading.get_ident(), torch.get_num_threads())
        both.wait()

    each_on_its_core(work, range(6), 2)
    assert sorted(seen) == list(range(6))
    assert len({thread for thread, _ in seen.values()}) == 2
    assert {threads for _, threads in seen.values()} == {1}
    assert torch.get_num_threads() == before

    def fail(item):
        both.wait()
        if threading.get_ident() != threading.main_thread().ident:
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        each_on_its_core(fail, range(2), 2)
    assert torch.get_num_threads() == before


@compiled
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(3, 7), torch.zeros(3, dtype=torch.int64), "inputs of 7 values for a layer of 4"),
        (torch.rand(3, 4), torch.tensor([0, 1, 2]), "labels must be 3 classes from 0 to 1"),
        (torch.rand(3, 4), torch.tensor([0, -1, 1]), "labels must be 3 classes from 0 to 1"),
        (torch.rand(3, 4), torch.zeros(3, 2, dtype=torch.int64), "labels must be 3 classes from 0 to 1"),
    ],
)
def test_what_would_read_foreign_memory_is_refused(x, y, message):
    net = models.build("2nn", (4,), 2, torch.Generator())
    engine = choose(net, cross_entropy, (4,), "compiled")
    with pytest.raises(ValueError, match=message):
        engine(Layout.of(net).row(net), [Examples(x, y)], LocalSpec(1, 2, 0.1), [np.random.default_rng(0)])
