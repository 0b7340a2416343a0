"""What is refused before the first iteration, and with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model
from torch import nn

from fltoolkit import models, registry
from fltoolkit.errors import InputError
from fltoolkit.inversion.checks import check_observation, check_searchable, stackable
from fltoolkit.types import Layout


class Once(torch.autograd.Function):
    """x², with a backward pass that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Square(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Overwrites(nn.Module):
    """Scales in place what the layer before has saved for its own backward pass."""

    def forward(self, x):
        return x.sigmoid_().mul_(2)


def with_layer(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 8), layer, nn.Linear(8, 4))


def seen(model, **changes):
    """An observation that no gradient had to be computed for."""
    row = Layout.of(model).row(model)
    own = {"model": model, "layout": Layout.of(model), "params": row, "update": torch.zeros_like(row)}
    return replace(observe(tiny_model(), tiny_examples(2)), **(own | changes))


@pytest.mark.parametrize(
    ("layer", "name"), [(Square(), r"'2' \(Square\)"), (Overwrites(), r"layer '2' \(Overwrites\)")]
)
def test_layers_that_cannot_be_differentiated_twice_are_named(layer, name):
    with pytest.raises(InputError, match=rf"differentiable twice to be inverted, but .*{name}"):
        check_searchable(seen(with_layer(layer)))


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.BatchNorm1d(8)])
def test_ordinary_layers_are_fine(layer):
    check_searchable(seen(with_layer(layer)))


@pytest.mark.parametrize("name", ["lenet", "2nn", "cnn", "mlp", "softmax", "convnet16"])
def test_every_image_model_is_fine_and_left_as_it_was(name):
    shape = (1, 28, 28)
    model = models.build(name, shape, 10, torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_searchable(seen(model, input_shape=shape, num_classes=10))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_a_loss_that_ignores_the_model():
    def constant(logits, y):
        return torch.ones(len(y))

    def cut(logits, y):
        return nn.functional.cross_entropy(logits.detach(), y, reduction="none")

    for loss in (constant, cut):
        with pytest.raises(InputError, match="loss must depend on the input through the model"):
            check_searchable(seen(tiny_model(), loss=loss))


def test_a_model_that_ignores_its_input():
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.bias.expand(len(x), 4)

    with pytest.raises(InputError, match="loss must depend on the input through the model"):
        check_searchable(seen(Blind()))


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [0], [0.0, 1.0]])
def test_labels_outside_the_range(labels):
    with pytest.raises(InputError, match=r"labels must be 2 integers in 0\.\.3, got"):
        check_observation(seen(tiny_model(), labels=torch.tensor(labels)))


@pytest.mark.parametrize("name", ["dlg", "inverting", "gradinversion"])
def test_attacks_refuse_before_they_start(name):
    with pytest.raises(InputError, match=r"\(Square\)"):
        registry.make_attack(name)(seen(with_layer(Square())), torch.Generator().manual_seed(0))


class OldStyle(torch.autograd.Function):
    """x², differentiable twice, but closed to `torch.func`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OldSquare(nn.Module):
    def forward(self, x):
        return OldStyle.apply(x)


@pytest.mark.parametrize("name", ["idlg", "inverting:tv=0"])
def test_models_that_cannot_be_stacked_are_attacked_one_guess_at_a_time(name):
    model, data = with_layer(OldSquare()), tiny_examples(1)
    new = with_layer(nn.Softplus())
    assert not stackable(seen(model))
    assert stackable(seen(new))
    found = registry.make_attack(name)(observe(model, data), torch.Generator().manual_seed(0))
    assert (found.x - data.x).square().mean() < 0.01
