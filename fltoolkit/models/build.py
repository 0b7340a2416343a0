"""Models by name: built, initialised, and checked against the data that they are to train on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import nn

from fltoolkit.errors import InputError, unknown
from fltoolkit.models.images import cifarcnn, cnn, convnet, lenet, mlp, resnet18, softmax, tanhcnn, two_nn
from fltoolkit.models.text import PeepholeLstm, charlstm, wordlstm
from fltoolkit.types import Layout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """build: from input shape and classes. about: one line. half_range: start every parameter uniform
    within ± this, instead of PyTorch's default for its layer. reads: "values" such as pixels, or "tokens"."""

    build: Callable[[Shape, int], nn.Module]
    about: str
    half_range: float | None = None
    reads: str = "values"


MODELS: dict[str, Model] = {
    "lenet": Model(lenet, "sigmoid LeNet of DLG (Zhu et al. 2019), 85,036 parameters on photos", 0.5),
    "2nn": Model(two_nn, "2NN of FedAvg (McMahan et al. 2017), 199,210 parameters on MNIST"),
    "cnn": Model(cnn, "CNN of FedAvg (McMahan et al. 2017), 1,663,370 parameters on MNIST"),
    "cifarcnn": Model(cifarcnn, "CIFAR-10 net of FedAvg, from TensorFlow's tutorial, 1,068,298 parameters"),
    "convnet": Model(convnet, "ConvNet of Inverting Gradients (Geiping et al. 2020), 2,904,970 parameters"),
    "convnet16": Model(partial(convnet, width=16), "the same a quarter as wide, 187,114 parameters"),
    "resnet18": Model(resnet18, "ResNet-18 for 32x32 images (He et al. 2016), 11,173,962 parameters"),
    "charlstm": Model(
        charlstm, "next character, FedAvg's peephole LSTM, 866,578 parameters on shakespeare", reads="tokens"
    ),
    "wordlstm": Model(
        wordlstm, "next word, FedAvg's peephole LSTM, 4,950,544 parameters with 10,000 words", reads="tokens"
    ),
    "tanhcnn": Model(tanhcnn, "tanh CNN for DP-SGD (Papernot et al. 2021), 26,010 parameters on MNIST"),
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


def check_fits(
    model: nn.Module, input_shape: Shape, num_classes: int, tokens: bool = False, each: bool = False
) -> None:
    """Raise InputError, naming what is wrong, unless `model` maps `[2, *input_shape]` to `[2, classes]`
    with finite trainable parameters. The model is left as it was.

    tokens: it is given ids, int64. each: it gives logits for every token, `[2, *input_shape, classes]`.
    """
    layout = Layout.of(model)
    bad = layout.first_non_finite(layout.row(model))
    if bad is not None:
        raise InputError(f"model must have finite parameters, got NaN or infinity in layer {bad!r}")
    kind = torch.int64 if tokens else torch.float32
    zeros = torch.zeros(2, *input_shape, dtype=kind, device=next(model.parameters()).device)
    try:
        with evaluating(model), torch.no_grad():
            logits = model(zeros)
    except Exception as e:  # a user's forward pass may raise anything
        first = (str(e) or type(e).__name__).splitlines()[0]
        what = "token ids" if tokens else "inputs"
        raise InputError(f"model must accept {what} of shape {tuple(input_shape)}, got: {first}") from e
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (2, *(input_shape if each else ()), num_classes):
        one = "a token" if each else "an example"
        raise InputError(f"model must give {num_classes} logits {one}, got output shape {shape} for 2")


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


def with_frozen_norm(model: nn.Module) -> nn.Module:
    """A copy of `model` whose BatchNorm layers are in evaluation mode: they use their running statistics."""
    model = deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    return model


def _users(name: str, shape: Shape, classes: int, rng: torch.Generator) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        raise InputError(f"model must name an importable module:function, got {name!r}: {e}") from e
    if not callable(factory):
        raise InputError(f"model {name!r} must be a function, got {type(factory).__name__}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        model = factory(shape, classes)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


@torch.no_grad()
def _initialise(model: nn.Module, half_range: float | None, rng: torch.Generator) -> None:
    """PyTorch's defaults: Linear and Conv2d uniform within ± 1 / sqrt(fan in), bias included; BatchNorm the
    identity; Embedding standard normal."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = half_range or 1 / sqrt(layer.weight[0].numel())
            for p in layer.parameters():
                p.uniform_(-bound, bound, generator=rng)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
        elif isinstance(layer, nn.Embedding):
            layer.weight.normal_(generator=rng)
        elif isinstance(layer, PeepholeLstm):
            layer.reset(rng)
