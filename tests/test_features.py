"""Unmixing the last layer's gradient, and the attack that inverts what comes out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import observe, plain_gradient, tiny_model
from torch import nn

from attacks.features import Features
from fltoolkit import models, registry
from fltoolkit.audit import Scene, Stage
from fltoolkit.data import Dataset
from fltoolkit.data.photos import three_photographs
from fltoolkit.errors import InputError
from fltoolkit.inversion.labels.layer import layer_names
from fltoolkit.inversion.prior import Outside, colour_variation, total_variation
from fltoolkit.inversion.spectrum import Spectrum
from fltoolkit.inversion.unmixing import FeatureSearch, unmixing
from fltoolkit.types import Examples, Layout, LocalSpec


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(labels, classes=6):
    g = torch.Generator().manual_seed(3)
    model = tiny_model(classes=classes)
    data = Examples(torch.rand(len(labels), 1, 5, 5, generator=g), torch.tensor(labels))
    return model, data, observe(model, data, num_classes=classes)


def unmixed(seen, labels):
    weight = seen.layout.unflatten(seen.gradient)["3.weight"]
    return unmixing(seen, labels) @ weight


def test_features_of_different_labels_come_out_one_by_one():
    model, data, seen = batch([4, 0, 2])
    assert (unmixed(seen, data.y) - model[:3](data.x)[[1, 2, 0]]).abs().max() < 1e-4


def test_examples_of_one_label_stay_a_mean():
    model, data, seen = batch([1, 3, 1, 0])
    features = model[:3](data.x)
    found, single = unmixed(seen, data.y), features[[3, 0, 1]]
    mean = torch.stack([features[3], features[[0, 2]].mean(0), features[1]])
    assert (found - mean).abs().max() < 0.02
    assert (found - single).abs().max() > 0.1


def test_the_search_has_the_gradient_that_autograd_has():
    model, data, seen = batch([4, 0])
    gray = torch.full((2, 1, 5, 5), 0.5)
    goal = FeatureSearch(seen, gray, [(0.3, total_variation), (2.0, Outside(0.0, 1.0))])
    goal.wanted = model[:3](data.x).detach()
    z = (3 * torch.rand(2, 25, generator=seeded()) - 1).requires_grad_()
    loss, gradient = goal(z, torch.arange(2))
    x = z.view(2, 1, 5, 5)
    apart = (model[:3](x) - goal.wanted).square().sum(1)
    plain = apart / (goal.wanted - model[:3](gray)).square().sum(1).mean()
    tv = (x[..., 1:, :] - x[..., :-1, :]).abs().mean((1, 2, 3))
    tv = tv + (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
    outside = (torch.relu(-x) + torch.relu(x - 1)).square().mean((1, 2, 3))
    plain = plain + 0.3 * tv + 2 * outside
    (expected,) = torch.autograd.grad(plain.sum(), z)
    assert torch.allclose(loss, plain, rtol=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    at_gray = FeatureSearch(seen, gray, [])
    at_gray.wanted = goal.wanted
    assert float(at_gray(gray.flatten(1), torch.arange(2))[0].mean()) == pytest.approx(1)


def photographs(count, local, model="convnet16"):
    data = Dataset("photographs", Examples(three_photographs(count), torch.arange(count)), None, 10)
    stage = Stage(Scene(data=data, model=model, batch=count, local=local, frozen_norm=True))
    transcript, public = stage.round(0)
    return stage.threat.observe(transcript, 0, public), transcript.truth[0]


def psnr(found, truth):
    order = [int((found.y == c).nonzero()[0, 0]) for c in truth.y]
    return -10 * (found.x.clamp(0, 1)[order] - truth.x).square().mean((1, 2, 3)).log10()


def test_a_deep_network_gives_more_of_a_photograph_by_its_features_than_by_its_gradient():
    """Photograph 0 of ConvNet-16, at 60 iterations each; a gray image has 10.0 dB."""
    seen, truth = photographs(1, LocalSpec(1, None, 0.01))
    sides = [registry.make_attack(s)(seen, seeded()) for s in ("features:steps=60", "inverting:steps=60")]
    ours, theirs = (float(psnr(f, truth)[0]) for f in sides)
    assert ours > 12
    assert ours > theirs + 1


@pytest.fixture(scope="module")
def several():
    return photographs(3, LocalSpec(1, 1, 0.01))


def test_local_steps_are_played_again_in_the_order_that_explains_them(several):
    seen, truth = several
    found = registry.make_attack("features:steps=60,turns=2")(replace(seen, labels=None), seeded())
    once = registry.make_attack("features:steps=60,turns=1")(replace(seen, local=None), seeded())
    assert sorted(found.y.tolist()) == sorted(truth.y.tolist())
    assert psnr(found, truth).mean() > 12
    assert psnr(found, truth).mean() > psnr(once, truth).mean() + 2


def test_local_steps_move_features_further_than_images_differ(several):
    seen, truth = several
    x = truth.x[truth.y.argsort()]
    features = FeatureSearch(seen, x, []).at_gray
    weight = seen.layout.unflatten(seen.gradient)[layer_names(seen)[0]]
    moved = (unmixing(seen, truth.y) @ weight - features).norm(dim=1) / features.norm(dim=1)
    apart = (features - features.mean(0)).norm(dim=1) / features.norm(dim=1)
    assert apart.max() < 0.01 < moved.max()


def test_a_clip_hides_the_scale_and_little_else(several):
    seen, truth = several
    norm = 0.5 * float(seen.update.norm())
    clipped = replace(seen, update=0.5 * seen.update, defenses=({"name": "clip", "norm": norm},))
    spec = "features:steps=60,turns=2"
    open_, blind, fooled = (
        registry.make_attack(s)(o, seeded())
        for s, o in ((spec, seen), (spec, clipped), (f"{spec},adapt=false", clipped))
    )
    assert "up to scale" in blind.adaptation
    assert not open_.adaptation
    assert psnr(blind, truth).mean() > psnr(open_, truth).mean() - 1
    assert psnr(fooled, truth).mean() < psnr(blind, truth).mean() - 2


def test_what_cannot_be_searched_ends_at_once():
    _, _, seen = batch([0, 1])
    broken = replace(seen, update=torch.full_like(seen.update, torch.nan))
    with pytest.raises(InputError, match="finite"):
        registry.make_attack("features")(broken, seeded())


def test_colour_is_held_back_by_a_symmetric_positive_map():
    metric, v = Spectrum((3, 4, 4), 48, 0.8, chroma=0.5), torch.randn(20, 48)
    gram = v @ metric(v).T
    assert torch.allclose(gram, gram.T, atol=1e-4)
    assert (gram.diagonal() > 0).all()
    flat = Spectrum((3, 4, 4), 48, 0.0, chroma=0.5)
    gray = torch.randn(1, 1, 4, 4).expand(1, 3, 4, 4).reshape(1, 48)
    one = gray[:, :16]
    warm, green = torch.cat([one, 0 * one, -one], 1), torch.cat([-one, 2 * one, -one], 1)
    assert torch.allclose(flat(gray), gray, atol=1e-6)
    assert torch.allclose(flat(warm), warm / 4, atol=1e-6)
    assert torch.allclose(flat(green), green / 36, atol=1e-6)
    assert torch.equal(Spectrum((3, 4, 4), 48, 0.0)(v), Spectrum((3, 4, 4), 48, 0.0, chroma=1)(v))


def test_variation_of_colour_is_that_along_three_axes():
    """A slow loop over pixels; plain total variation of what has not three channels."""
    x, axes = torch.rand(2, 1, 3, 4, 5, generator=seeded()), [(1, 1, 1), (1, 0, -1), (1, -2, 1)]
    found, nobody = colour_variation(x, torch.zeros(2, 1), torch.arange(2)), torch.zeros(1)
    for image, value in zip(x[:, 0], found, strict=True):
        down, right = [], []
        for axis, weight in zip(axes, (1, 1, 4), strict=True):
            unit = torch.tensor(axis) / sum(a * a for a in axis) ** 0.5
            plane = weight * torch.einsum("c,chw->hw", unit, image)
            down += [abs(plane[i + 1, j] - plane[i, j]) for i in range(3) for j in range(5)]
            right += [abs(plane[i, j + 1] - plane[i, j]) for i in range(4) for j in range(4)]
        assert value == pytest.approx(float(sum(down) / len(down) + sum(right) / len(right)), rel=1e-5)
    assert torch.equal(
        colour_variation(x[:, :, :2], nobody, nobody), total_variation(x[:, :, :2], nobody, nobody)
    )


def test_several_searches_end_in_their_mean(several):
    """Searches from two starts at once are those from either alone, and the result is their mean."""
    seen, truth = several
    attack = Features()
    goal = FeatureSearch(seen, torch.full_like(truth.x, 0.5), attack._priors(seen))
    goal.wanted = goal.features(truth.x).detach()
    starts = attack._disturbed(torch.full_like(truth.x, 0.5), (0.0, 1.0), seeded())[:2]
    both, losses, used = attack._descend(goal, starts, 20)
    alone = [attack._descend(goal, s[None], 10) for s in starts]
    assert len(losses) <= used <= 22
    assert torch.allclose(both, torch.stack([x for x, _, _ in alone]).mean(0), atol=2e-3)
    assert not torch.allclose(both, alone[0][0], atol=2e-2)


def test_starts_are_disturbed_as_images_vary():
    """By the standard deviation that was asked for, in parts of the range, and more in slow waves."""
    x, attack = torch.rand(2, 3, 16, 16, generator=seeded()), Features(members=50, disturb=0.2)
    noise = attack._disturbed(x, (-1.0, 3.0), seeded()) - x
    assert noise.shape == (50, 2, 3, 16, 16)
    assert float(noise.std()) == pytest.approx(0.8, rel=1e-3)
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1, 2))
    assert power[0, 1] > 10 * power[0, 7]
    green = torch.einsum("c,mschw->mshw", torch.tensor([-1.0, 2, -1]) / 6**0.5, noise)
    assert green.square().mean() < 0.01 * noise.mean(2).square().mean()


def test_softmax_regression_is_its_own_features():
    """Where inputs enter the last layer, unmixing is the whole reconstruction."""
    model = models.build("softmax", (1, 5, 5), 6, torch.Generator().manual_seed(0))
    assert isinstance(model[-1], nn.Linear)
    data = Examples(torch.rand(3, 1, 5, 5, generator=seeded(2)), torch.tensor([5, 1, 2]))
    seen = observe(model, data, num_classes=6, layout=Layout.of(model), update=-plain_gradient(model, data))
    found = registry.make_attack("features:tv=0,steps=300")(seen, seeded())
    assert psnr(found, data).min() > 30
