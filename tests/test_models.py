"""The papers' models: sizes, starts, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fltoolkit import models
from fltoolkit.errors import InputError
from fltoolkit.models.images import Distorted
from fltoolkit.models.text import CHARACTERS


def built(name, shape=(1, 28, 28), classes=10, seed=0):
    return models.build(name, shape, classes, torch.Generator().manual_seed(seed))


def make_users_model(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


def make_nothing(shape, classes):
    return None


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("2nn", (1, 28, 28), 10, 199_210),
        ("cnn", (1, 28, 28), 10, 1_663_370),
        ("lenet", (3, 32, 32), 100, 85_036),
        ("tanhcnn", (1, 28, 28), 10, 26_010),
        ("mlp", (1, 8, 8), 10, 19_210),
        ("softmax", (1, 28, 28), 10, 7_850),
        ("cifarcnn", (3, 32, 32), 10, 1_068_298),
        ("convnet", (3, 32, 32), 10, 2_904_970),
        ("convnet16", (3, 32, 32), 10, 187_114),
        ("resnet18", (3, 32, 32), 10, 11_173_962),
        ("charlstm", (80,), CHARACTERS, 866_578),
        ("wordlstm", (10,), 10_000, 4_950_544),
    ],
)
def test_parameter_counts(name, shape, classes, parameters):
    model = built(name, shape, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    tokens = models.MODELS[name].reads == "tokens"
    models.check_fits(model, shape, classes, tokens, each=tokens)


@pytest.mark.parametrize("name", [n for n, m in models.MODELS.items() if m.reads == "values"])
@pytest.mark.parametrize("shape", [(1, 9, 10), (3, 33, 21)])
def test_models_adapt_to_the_shape_and_start_from_their_generator_alone(name, shape):
    state = torch.random.get_rng_state()
    first, same, other = built(name, shape), built(name, shape), built(name, shape, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    models.check_fits(first, shape, 10)
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert all(not torch.equal(a, c) for a, _, c in pairs if a.dim() > 1)


@pytest.mark.parametrize("name", ["charlstm", "wordlstm"])
def test_language_models_start_from_their_generator_alone_and_read_lines_only(name):
    state = torch.random.get_rng_state()
    first, same, other = built(name, (6,), 20), built(name, (6,), 20), built(name, (6,), 20, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = zip(first.parameters(), same.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    with pytest.raises(InputError, match=r"must get lines of token ids \[T\], got inputs \(1, 28, 28\)"):
        built(name)
    with pytest.raises(InputError, match=r"must give 21 logits a token, got output shape \(2, 6, 20\)"):
        models.check_fits(first, (6,), 21, tokens=True, each=True)
    with pytest.raises(InputError, match="model must accept token ids of shape"):
        models.check_fits(built("2nn"), (6,), 10, tokens=True, each=True)


def test_distorted_images_are_cut_mirrored_and_standardised():
    x = torch.rand(400, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    layer = Distorted(24, 24)
    middle = layer.eval()(x)
    assert middle.shape == (400, 3, 24, 24)
    assert middle.mean((1, 2, 3)).abs().max() < 1e-5
    assert (middle.std((1, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.allclose(
        middle[0] * x[0, :, 4:28, 4:28].std() + x[0, :, 4:28, 4:28].mean(), x[0, :, 4:28, 4:28], atol=1e-3
    )
    torch.manual_seed(0)
    ramp = torch.arange(32.0).expand(400, 3, 32, 32) / 64 + 0.25
    drawn = layer.train()(ramp)
    rising = drawn[:, 0, 0, 1] > drawn[:, 0, 0, 0]
    assert 160 < rising.sum() < 240
    raw = layer._distort(ramp)
    slope = (raw[:, 0, 0, 1] - raw[:, 0, 0, 0]).abs() * 64
    assert 0.2 <= slope.min() < 0.3
    assert 1.7 < slope.max() <= 1.8
    shift = raw.mean((1, 2, 3)) - ramp.mean()
    cut = 4 / 64
    assert 63 / 255 - 0.02 < shift.max() <= 63 / 255 + cut
    assert torch.equal(layer.eval()(x), middle)


def test_lenet_starts_uniform_within_a_half():
    model = built("lenet", (3, 32, 32), 100)
    for p in (model[0].weight, model[-1].weight, model[-1].bias):
        assert p.abs().max() <= 0.5
        assert p.std().item() == pytest.approx(1 / 12**0.5, rel=0.15)


def test_the_others_start_as_pytorch_does():
    ours, theirs = built("2nn"), nn.Linear(784, 200)
    assert ours[1].weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.02)
    assert ours[1].bias.abs().max() <= 1 / 28
    assert built("cnn")[0].weight.abs().max().item() == pytest.approx(1 / 5, rel=0.05)


def test_users_model_by_module_and_function():
    model = built("test_models:make_users_model", (1, 4, 4), 3)
    assert sum(p.numel() for p in model.parameters()) == 51
    again = built("test_models:make_users_model", (1, 4, 4), 3)
    assert torch.equal(model[1].weight, again[1].weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lanet", r"unknown model 'lanet'; did you mean 'lenet'\? \(known: 2nn, charlstm, cifarcnn, cnn"),
        ("no.such.module:f", "model must name an importable module:function"),
        ("./here:f", "model must name an importable module:function, got './here:f'"),
        ("math:pi", "model 'math:pi' must be a function, got float"),
        ("test_models:nothing_here", "model must name an importable module:function"),
        ("test_models:make_nothing", "must return a torch.nn.Module, got NoneType"),
    ],
)
def test_models_that_cannot_be_built(name, message):
    with pytest.raises(InputError, match=message):
        built(name)


def test_image_too_small_for_the_network():
    with pytest.raises(InputError, match="at least 4x4, got inputs"):
        built("cnn", (1, 3, 3))


def test_what_does_not_fit_is_refused():
    model = built("2nn")
    with pytest.raises(InputError, match=r"model must accept inputs of shape \(3, 32, 32\)"):
        models.check_fits(model, (3, 32, 32), 10)
    with pytest.raises(InputError, match=r"model must give 7 logits an example, got output shape \(2, 10\)"):
        models.check_fits(model, (1, 28, 28), 7)
    with pytest.raises(InputError, match="no trainable parameters"):
        models.check_fits(nn.Flatten(), (1, 28, 28), 784)
    with torch.no_grad():
        model[3].bias[0] = torch.nan
    with pytest.raises(InputError, match=r"got NaN or infinity in layer '3\.bias'"):
        models.check_fits(model, (1, 28, 28), 10)


def test_check_leaves_the_model_as_it_was():
    """A frozen part of a model in training stays frozen, and running statistics stay."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    model[1].eval()
    before = {n: b.clone() for n, b in model.named_buffers()}
    models.check_fits(model, (1, 2, 2), 3)
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


class RaisesOddly(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        raise KeyError


def test_a_forward_pass_that_raises_anything_is_refused():
    with pytest.raises(InputError, match=r"model must accept inputs of shape \(4,\), got: KeyError"):
        models.check_fits(RaisesOddly(), (4,), 3)
