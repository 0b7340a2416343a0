"""The compiled step, reduced precision and the search's metric, each against the plain way."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import observe, tiny_examples
from torch import nn
from torch.func import vmap

from fltoolkit import registry
from fltoolkit.audit import Scene, Stage, run
from fltoolkit.errors import InputError
from fltoolkit.inversion import compiled, distance
from fltoolkit.inversion.client import one_step
from fltoolkit.inversion.lbfgs import LBFGS
from fltoolkit.inversion.matching import GradientMatching, Objective
from fltoolkit.inversion.prior import total_variation
from fltoolkit.inversion.spectrum import Spectrum

compiles = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)


def problem(rows=6, labels=True, **objective):
    """Rows that belong to two victims of a convolutional model, and a guess for each."""
    pairs = [(convolutional(s), tiny_examples(2, s)) for s in range(2)]
    owner = torch.arange(rows) % 2
    fixed = torch.stack([pairs[v][1].y for v in owner.tolist()]) if labels else None
    found = GradientMatching([observe(*p) for p in pairs], owner, fixed, Objective(**objective))
    return found, torch.rand(rows, found.variables, generator=torch.Generator().manual_seed(7))


def convolutional(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Sigmoid(), nn.Conv2d(3, 2, 3, stride=2), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["squared", "relative", "cosine", "scaled", "aligned"])
@pytest.mark.parametrize("labels", [True, False])
def test_the_program_computes_what_the_eager_step_does(form, labels):
    setting = {"distance": getattr(distance, form), "priors": ((0.3, total_variation),)}
    eager, z = problem(labels=labels, **setting)
    rows = torch.arange(6)
    update = one_step(compiled.unfolded(eager._first.model), eager._first.loss)
    plain = compiled.evaluation(update, eager.layout, eager._decode, *setting.values())
    owner = eager.owner
    found = plain(z, eager.params[owner], eager._target[owner], owner, eager.labels, {})
    for a, b in zip(found, eager(z, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_rows_equal_eager_ones_whatever_their_number():
    eager, z = problem()
    fast, _ = problem(compile=True)
    for count in (6, 1, 4):  # a block and a half, less than a block, a block
        rows = torch.arange(6)[-count:]
        for a, b in zip(fast(z[-count:], rows), eager(z[-count:], rows), strict=True):
            assert len(a) == count
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert fast.remark.startswith("compiled in")


def test_what_fails_to_compile_goes_on_eagerly_and_says_so(monkeypatch):
    def refuse(*args):
        raise ValueError("no compiler here\nand more")

    monkeypatch.setattr("torch.compile", lambda *a, **k: refuse)
    eager, z = problem()
    fast, _ = problem(compile=True)
    with pytest.warns(UserWarning, match="ValueError: no compiler here$"):
        found = fast(z, torch.arange(6))
    assert fast.remark == "not compiled: ValueError: no compiler here"
    assert torch.equal(found[0], eager(z, torch.arange(6))[0])


def test_a_search_without_a_program_says_so():
    alone, z = problem(compile=True, one_by_one=True)
    with pytest.warns(UserWarning, match="has no program"):
        alone(z, torch.arange(6))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2)), nn.Conv2d(2, 3, 2, dilation=2, bias=False)]
)
def test_unfolded_convolution(layer):
    x = torch.rand(2, 2, 7, 8)
    swapped = compiled.unfolded(nn.Sequential(layer))
    assert type(swapped[0]) is compiled.Unfolded
    assert type(layer) is nn.Conv2d
    torch.testing.assert_close(swapped(x), layer(x))
    stacked = vmap(lambda v: swapped(v))(x[:, None])
    torch.testing.assert_close(stacked[:, 0], layer(x))


def test_convolutions_that_do_more_are_left_alone():
    others = nn.Sequential(
        nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    )  # fmt: skip
    assert {type(m) for m in compiled.unfolded(others)} == {nn.Conv2d}


@pytest.mark.parametrize("one_by_one", [False, True])
def test_bf16_keeps_the_direction_but_not_the_digits(one_by_one):
    full, z = problem(one_by_one=one_by_one)
    half, _ = problem(one_by_one=one_by_one, precision="bf16")
    rows = torch.arange(6)
    (loss, g), (loss16, g16) = full(z, rows), half(z, rows)
    assert loss16.dtype == g16.dtype == torch.float32
    torch.testing.assert_close(loss16, loss, rtol=0.05, atol=1e-4)
    assert torch.cosine_similarity(g, g16).min() > 0.99
    assert not torch.equal(g, g16)


def test_bf16_with_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    ).eval()
    data = tiny_examples(2, 0)
    full, half = (
        GradientMatching([observe(model, data)], torch.zeros(2, dtype=torch.long), data.y.repeat(2, 1), o)
        for o in (Objective(), Objective(precision="bf16"))
    )
    z = torch.rand(2, full.variables, generator=torch.Generator().manual_seed(7))
    (_, g), (_, g16) = full(z, torch.arange(2)), half(z, torch.arange(2))
    assert torch.cosine_similarity(g, g16).min() > 0.98


def test_unknown_precision_is_refused():
    with pytest.raises(InputError, match=r"precision must be one of .*float32.*bf16.*, got 'fp8'"):
        registry.make_attack("idlg", precision="fp8")


def test_patience_decides_when_a_search_stops():
    def iterations(patience):
        attack = registry.make_attack(f"inverting:patience={patience},tolerance=0", steps=400)
        return run(Scene(attack=attack, data="digits")).report["iterations"]

    assert iterations(20) < iterations(150) < iterations(0) == 400


def test_metric_is_symmetric_positive_and_leaves_the_rest_alone():
    metric = Spectrum((2, 5, 6), 60, 0.7)
    v, w = torch.randn(2, 3, 64)
    torch.testing.assert_close((v * metric(w)).sum(1), (w * metric(v)).sum(1), rtol=1e-4, atol=1e-4)
    assert ((v * metric(v)).sum(1) > 0).all()
    assert torch.equal(metric(v)[:, 60:], v[:, 60:])
    assert torch.equal(Spectrum((7,), 7, 0.7)(v), v)
    flat = torch.ones(1, 60)
    torch.testing.assert_close(metric(flat) / flat, torch.full((1, 60), metric(flat)[0, 0].item()))


def test_directions_are_those_of_the_two_loop_recursion_with_that_metric():
    """Nocedal and Wright 2006, Algorithm 7.4, with H0 = γ M, γ = sᵀy / yᵀMy."""
    torch.manual_seed(0)
    metric, a = Spectrum((1, 4, 4), 16, 0.8), torch.randn(20, 16)
    hessian = a.T @ a / 20 + 0.1 * torch.eye(16)

    def bowl(z, rows):
        return 0.5 * ((z @ hessian) * z).sum(1), z @ hessian

    found = LBFGS(bowl, torch.randn(1, 16), history=10, metric=metric)
    pairs = []
    for _ in range(6):
        before = found.z.clone(), found.gradient.clone()
        found.step()
        pairs.append((found.z[0] - before[0][0], found.gradient[0] - before[1][0]))
    q, alphas = found.gradient[0].clone(), []
    for s, y in reversed(pairs):
        alphas.append(s @ q / (s @ y))
        q = q - alphas[-1] * y
    s, y = pairs[-1]
    r = s @ y / (y @ metric(y[None])[0]) * metric(q[None])[0]
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + s * (alpha - y @ r / (s @ y))
    torch.testing.assert_close(found._direction()[0], -r, rtol=1e-3, atol=1e-5)


def test_the_spectrum_of_images_saves_iterations():
    def psnr(options):
        attack = registry.make_attack(f"idlg:{options}", steps=120, restarts=1)
        return run(Scene(attack=attack, victims=2)).report["metrics"]["psnr_db"]["mean"]

    assert psnr("spectrum=0.5,start_std=0.02") > psnr("start_std=0.02") + 3


def test_compile_and_precision_are_flags(tmp_path, monkeypatch):
    from fltoolkit import cli

    seen = {}
    monkeypatch.setattr(Stage, "__init__", lambda self, scene: seen.update(attack=scene.attack) or stop())

    def stop():
        raise InputError("seen")

    flags = ["audit", "--attack", "inverting", "--compile", "--precision", "bf16"]
    assert cli.main([*flags, "--out", str(tmp_path)]) == 2
    assert seen["attack"].compile
    assert seen["attack"].precision == "bf16"
