"""Networks for images and other inputs of a fixed shape."""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import Tensor, nn

from fltoolkit.errors import InputError

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


def tanhcnn(shape: Shape, classes: int) -> nn.Module:
    """Papernot et al. 2021, arXiv:2007.14191, table 1, with tanh, whose bounded activations suit DP-SGD: an
    8x8 convolution of 16 and a 4x4 one of 32 channels, both with stride 2 and 2x2 max pooling of stride 1,
    32 units; 26,010 parameters on MNIST. Images too small for that get a padded second convolution."""
    channels, *image = _image(shape, 8)
    sides = [(s - 2) // 2 for s in image]
    padding = 0 if min(sides) >= 6 else 2
    return nn.Sequential(
        nn.Conv2d(channels, 16, 8, stride=2, padding=3),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2, padding=padding),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(32 * prod((s + 2 * padding - 4) // 2 for s in sides), 32),
        nn.Tanh(),
        nn.Linear(32, classes),
    )


def mlp(shape: Shape, classes: int) -> nn.Module:
    """One hidden layer of 256 sigmoid units."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), 256), nn.Sigmoid(), nn.Linear(256, classes))


def softmax(shape: Shape, classes: int) -> nn.Module:
    """Multinomial logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), classes))


class Distorted(nn.Module):
    """Images `[B, C, H, W]` in [0, 1] cut to `[B, C, height, width]` and standardised one by one.

    The preprocessing of McMahan et al. 2017 for CIFAR-10: in training mode a random cut, a mirror image half
    of the time, brightness moved by up to 63/255 and contrast by a factor from 0.2 to 1.8; in evaluation
    mode the middle cut. Then each image gets mean 0 and standard deviation 1.
    """

    draws = True

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        x = self._distort(x) if self.training else self._middle(x)
        mean = x.mean((1, 2, 3), keepdim=True)
        least = 1 / sqrt(x[0].numel())
        return (x - mean) / (x - mean).square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(least)

    def _middle(self, x: Tensor) -> Tensor:
        top, left = (x.shape[2] - self.height) // 2, (x.shape[3] - self.width) // 2
        return x[:, :, top : top + self.height, left : left + self.width]

    def _distort(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape

        def draw(low: float, high: float) -> Tensor:
            return torch.empty(n, 1, 1, 1, device=x.device).uniform_(low, high)

        rows = torch.randint(height - self.height + 1, (n, 1, 1), device=x.device)
        columns = torch.randint(width - self.width + 1, (n, 1, 1), device=x.device)
        rows = rows + torch.arange(self.height, device=x.device)[:, None]
        along = torch.arange(self.width, device=x.device)
        mirrored = draw(0, 1)[:, 0] < 0.5
        columns = columns + torch.where(mirrored, along.flip(0), along)
        cut = x.permute(0, 2, 3, 1)[torch.arange(n, device=x.device)[:, None, None], rows, columns]
        cut = cut.permute(0, 3, 1, 2) + draw(-63 / 255, 63 / 255)
        mean = cut.mean((2, 3), keepdim=True)
        return (cut - mean) * draw(0.2, 1.8) + mean


def cifarcnn(shape: Shape, classes: int) -> nn.Module:
    """The net of TensorFlow's old CIFAR-10 tutorial, which McMahan et al. 2017 take: cuts of three quarters
    of the side, two 5x5 convolutions of 64 channels with 3x3 pooling of stride 2 and local response
    normalisation, 384 and 192 ReLU units; 1,068,298 parameters on CIFAR-10."""
    channels, height, width = _image(shape, 8)
    height, width = 3 * height // 4, 3 * width // 4
    sides = [(((s - 2) // 2 + 1) - 2) // 2 + 1 for s in (height, width)]
    return nn.Sequential(
        Distorted(height, width),
        nn.Conv2d(channels, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.LocalResponseNorm(9, alpha=0.001),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.ReLU(),
        nn.LocalResponseNorm(9, alpha=0.001),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(64 * prod(sides), 384),
        nn.ReLU(),
        nn.Linear(384, 192),
        nn.ReLU(),
        nn.Linear(192, classes),
    )


def convnet(shape: Shape, classes: int, width: int = 64) -> nn.Module:
    """Geiping et al. 2020, arXiv:2003.14053, section 5: eight 3x3 convolutions with BatchNorm and ReLU, two
    3x3 poolings, one linear layer; width 64 has 2,904,970 parameters on CIFAR-10."""
    channels, height, width_in = _image(shape, 9)
    before, after = (1, 2, 2, 4, 4, 4), (4, 4)
    layers: list[nn.Module] = []
    for block in (before, after):
        for factor in block:
            out = factor * width
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(3))
    pooled = (height // 9) * (width_in // 9)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * pooled, classes))


class Residual(nn.Module):
    """He et al. 2016, arXiv:1512.03385, figure 2: x + two 3x3 convolutions, each with BatchNorm; the sum
    passes a ReLU. A change of shape goes through a 1x1 convolution (their option B)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and channels == out
        projection = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if same else projection

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """He et al. 2016, arXiv:1512.03385, with the 3x3 first layer that is usual for 32x32 images; 11,173,962
    parameters on CIFAR-10."""
    channels, _, _ = _image(shape, 8)
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    channels = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(channels, out, stride), Residual(out, out, 1)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _image(shape: Shape, least: int) -> Shape:
    if len(shape) != 3 or min(shape[1:]) < least:
        raise InputError(f"model must get images [C, H, W] of at least {least}x{least}, got inputs {shape}")
    return shape
