"""The papers' models, built for any input shape, initialised from a named random stream alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import nn

from fltoolkit.errors import InputError, unknown
from fltoolkit.types import Layout

Shape = tuple[int, ...]


def two_nn(shape: Shape, classes: int) -> nn.Module:
    """McMahan et al. 2017, section 3: two hidden layers of 200 ReLU units; 199,210 parameters on MNIST."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(shape), 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """McMahan et al. 2017, section 3: two 5x5 convolutions (32, 64), each with 2x2 max pooling, 512 ReLU
    units; 1,663,370 parameters on MNIST."""
    channels, height, width = _image(shape, 4)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, classes),
    )


def lenet(shape: Shape, classes: int) -> nn.Module:
    """Zhu, Liu, Han 2019, arXiv:1906.08935: three 5x5 convolutions of 12 channels (strides 2, 2, 1) with
    sigmoids, then linear; every parameter starts uniform(-0.5, 0.5)."""
    channels, height, width = _image(shape, 1)
    sides = [(s + 1) // 2 for s in ((height + 1) // 2, (width + 1) // 2)]
    return nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=1, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(12 * prod(sides), classes),
    )


def mlp(shape: Shape, classes: int) -> nn.Module:
    """One hidden layer of 256 sigmoid units."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), 256), nn.Sigmoid(), nn.Linear(256, classes))


def softmax(shape: Shape, classes: int) -> nn.Module:
    """Multinomial logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), classes))


@dataclass(frozen=True)
class Model:
    """build: from input shape and classes. about: one line. half_range: start every parameter uniform
    within ± this, instead of PyTorch's default for its layer."""

    build: Callable[[Shape, int], nn.Module]
    about: str
    half_range: float | None = None


MODELS: dict[str, Model] = {
    "lenet": Model(lenet, "sigmoid LeNet of DLG (Zhu et al. 2019), 85,036 parameters on photos", 0.5),
    "2nn": Model(two_nn, "2NN of FedAvg (McMahan et al. 2017), 199,210 parameters on MNIST"),
    "cnn": Model(cnn, "CNN of FedAvg (McMahan et al. 2017), 1,663,370 parameters on MNIST"),
    "mlp": Model(mlp, "one hidden layer of 256 sigmoid units"),
    "softmax": Model(softmax, "multinomial logistic regression"),
}


def build(name: str, input_shape: Shape, num_classes: int, rng: torch.Generator) -> nn.Module:
    """The model called `name`, or what `module:function` returns for (input_shape, num_classes).

    A known model's start depends on `rng` alone; a user's function keeps its own, under `rng`'s seed.
    """
    if ":" in name:
        return _users(name, input_shape, num_classes, rng)
    if name not in MODELS:
        unknown("model", name, [*MODELS, "module:function"])
    with torch.device("meta"):
        model = MODELS[name].build(input_shape, num_classes)
    model = model.to_empty(device="cpu")
    _initialise(model, MODELS[name].half_range, rng)
    return model


def check_fits(model: nn.Module, input_shape: Shape, num_classes: int) -> None:
    """Raise InputError, naming what is wrong, unless `model` maps `[2, *input_shape]` to `[2, classes]`
    with finite trainable parameters. The model is left as it was."""
    layout = Layout.of(model)
    bad = layout.first_non_finite(layout.row(model))
    if bad is not None:
        raise InputError(f"model must have finite parameters, got NaN or infinity in layer {bad!r}")
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            logits = model(torch.zeros(2, *input_shape, device=device))
    except Exception as e:  # a user's forward pass may raise anything
        first = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"model must accept inputs of shape {tuple(input_shape)}, got: {first}") from e
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (2, num_classes):
        raise InputError(f"model must give {num_classes} logits an example, got output shape {shape} for 2")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has its own mode back, frozen ones too."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _users(name: str, shape: Shape, classes: int, rng: torch.Generator) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f"model must name an importable module:function, got {name!r}: {e}") from e
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        model = factory(shape, classes)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _image(shape: Shape, least: int) -> Shape:
    if len(shape) != 3 or min(shape[1:]) < least:
        raise InputError(f"model must get images [C, H, W] of at least {least}x{least}, got inputs {shape}")
    return shape


@torch.no_grad()
def _initialise(model: nn.Module, half_range: float | None, rng: torch.Generator) -> None:
    """PyTorch's default for Linear and Conv2d is uniform within ± 1 / sqrt(fan in), bias included."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = half_range or 1 / sqrt(layer.weight[0].numel())
            for p in layer.parameters():
                p.uniform_(-bound, bound, generator=rng)
