"""What each kind of layer makes of its inputs and pre-activation gradients: a `Term` a parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from fltoolkit.training.private.norms import (
    Term,
    explicit,
    from_chunks,
    gram_is_cheaper,
    gram_squares,
    lookup,
    outer,
)

LARGE = 4e6
"""Multiplications an example from which a convolution's examples go one by one, each filling a core."""

Rule = Callable[[Any, Tensor, Tensor, Collection[str]], dict[str, Term]]
"""`rule(layer, x [n, ..], d [n, ..], wanted)`: the terms of the parameters in `wanted`, by their name in the
layer; d is the gradient of each example's loss by the layer's output."""

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_WEIGHT_GRADIENT: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: conv_grad.conv1d_weight,
    nn.Conv2d: conv_grad.conv2d_weight,
    nn.Conv3d: conv_grad.conv3d_weight,
}


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of a layer, by its exact class; None where there is none or its settings are beyond it."""
    rule = RULES.get(type(layer))
    plain = {n for n, p in layer._parameters.items() if p is not None} <= {"weight", "bias"}
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    if isinstance(layer, nn.Embedding):
        plain = plain and not (layer.max_norm or layer.sparse or layer.scale_grad_by_freq)
    if isinstance(layer, nn.modules.conv._ConvNd):
        plain = plain and layer.padding_mode == "zeros" and _padding(layer) is not None
    return rule if plain and not changed else None


def takes(layer: nn.Module, x: Tensor) -> bool:
    """Whether x is a batch of inputs, where the layer would take a single one without a batch too."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return x.dim() == layer.weight.dim()
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return x.dim() == layer._get_no_batch_dim() + 1
    if isinstance(layer, nn.LayerNorm):
        return x.dim() > len(layer.normalized_shape)
    return x.dim() >= (1 if isinstance(layer, nn.Embedding) else 2)


def keeps_batch_first(model: nn.Module) -> bool:
    """Whether a model is a chain of layers that are known to keep the order of dimensions. (Where one joins
    the first two, the layer after it gets more than the batch, which `Capture` sees.)"""
    if type(model) is nn.Sequential:
        return all(keeps_batch_first(m) for m in model)
    return type(model) in _KEEPING or type(model) in RULES


def linear(layer: nn.Linear, x: Tensor, d: Tensor, wanted: Collection[str]) -> dict[str, Term]:
    terms = {}
    if "weight" in wanted:
        terms["weight"] = outer(x, d)
    if "bias" in wanted:
        terms["bias"] = explicit(d if d.dim() == 2 else d.flatten(1, -2).sum(1))
    return terms


def embedding(layer: nn.Embedding, x: Tensor, d: Tensor, wanted: Collection[str]) -> dict[str, Term]:
    return {"weight": lookup(x, d, layer.num_embeddings, layer.padding_idx)}


def convolution(layer: _Conv, x: Tensor, d: Tensor, wanted: Collection[str]) -> dict[str, Term]:
    terms = {}
    if "weight" in wanted:
        terms["weight"] = _kernel(layer, x, d)
    if "bias" in wanted:
        terms["bias"] = explicit(d.flatten(2).sum(2))
    return terms


def _kernel(layer: _Conv, x: Tensor, d: Tensor) -> Term:
    shape, groups = layer.weight.shape, layer.groups
    places, inputs, outputs = d[0, 0].numel(), prod(shape[1:]), shape[0] // groups

    def add(c: Tensor, out: Tensor) -> None:
        out.add_(_weight_gradient(layer, x, d * c.view(-1, *[1] * (d.dim() - 1)), 1))

    if type(layer) is nn.Conv2d and gram_is_cheaper(places, inputs, outputs):
        squares = [_gram(layer, x[i : i + 1], d[i : i + 1]) for i in range(len(x))]
        return Term(torch.cat(squares), add)
    return from_chunks(partial(_each, layer, x, d), shape.numel(), d, add)


def _each(layer: _Conv, x: Tensor, d: Tensor, many: int) -> Iterator[Tensor]:
    """Every example's gradient by the kernel, in chunks `[<= many, *shape]`: large ones alone, small ones as
    the groups of one convolution (Rochette, Manoel, Tramel 2019, arXiv:1912.06015)."""
    if layer.weight.numel() * d[0, 0].numel() >= LARGE:
        many = 1
    for p, q in zip(x.split(many), d.split(many), strict=True):
        p, q, n = p.reshape(1, -1, *p.shape[2:]), q.reshape(1, -1, *q.shape[2:]), len(p)
        yield _weight_gradient(layer, p, q, n).unflatten(0, (n, -1))


def _weight_gradient(layer: _Conv, x: Tensor, d: Tensor, copies: int) -> Tensor:
    """Of a convolution with the layer's kernel repeated `copies` times, each on channels of its own."""
    shape = (copies * layer.weight.shape[0], *layer.weight.shape[1:])
    padding, groups = _padding(layer), copies * layer.groups
    return _WEIGHT_GRADIENT[type(layer)](x, shape, d, layer.stride, padding, layer.dilation, groups)


def _gram(layer: nn.Conv2d, x: Tensor, d: Tensor) -> Tensor:
    """The squared norm `[1]` of one example's gradient by the kernel, group by group as by `gram_squares`."""
    padding: Any = _padding(layer)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    a, b = patches.view(layer.groups, -1, patches.shape[2]), d.reshape(layer.groups, -1, patches.shape[2])
    return gram_squares(a.transpose(1, 2), b.transpose(1, 2)).sum(0, keepdim=True)


def _padding(layer: nn.modules.conv._ConvNd) -> tuple[int, ...] | None:
    """The padding at both ends of each dimension; None where the ends differ."""
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return tuple(0 for _ in layer.kernel_size)
    both = [step * (k - 1) for step, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(b % 2 for b in both) else tuple(b // 2 for b in both)


def _affine(normal: Tensor, d: Tensor, wanted: Collection[str], over: Collection[int]) -> dict[str, Term]:
    """For y = weight · normal + bias: sums over the dimensions `over` along which the two are the same."""
    products = {"weight": lambda: d * normal, "bias": lambda: d}
    dims = list(over)
    return {n: explicit(t().sum(dims) if dims else t()) for n, t in products.items() if n in wanted}


def group_norm(layer: nn.GroupNorm, x: Tensor, d: Tensor, wanted: Collection[str]) -> dict[str, Term]:
    return _affine(F.group_norm(x, layer.num_groups, eps=layer.eps), d, wanted, range(2, x.dim()))


def layer_norm(layer: nn.LayerNorm, x: Tensor, d: Tensor, wanted: Collection[str]) -> dict[str, Term]:
    over = range(1, x.dim() - len(layer.normalized_shape))
    return _affine(F.layer_norm(x, layer.normalized_shape, eps=layer.eps), d, wanted, over)


def instance_norm(layer: nn.InstanceNorm2d, x: Tensor, d: Tensor, wanted: Collection[str]) -> dict[str, Term]:
    own = layer.training or layer.running_mean is None
    mean, var = (None, None) if own else (layer.running_mean, layer.running_var)
    return _affine(
        F.instance_norm(x, mean, var, use_input_stats=own, eps=layer.eps), d, wanted, range(2, x.dim())
    )


def fixed_batch_norm(layer: nn.BatchNorm2d, x: Tensor, d: Tensor, wanted: Collection[str]) -> dict[str, Term]:
    """BatchNorm in evaluation mode, by its running statistics."""
    normal = F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)
    return _affine(normal, d, wanted, range(2, x.dim()))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
}
RULES |= dict.fromkeys(_WEIGHT_GRADIENT, convolution)
RULES |= dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), instance_norm)
RULES |= dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), fixed_batch_norm)

_KEEPING: tuple[type[nn.Module], ...] = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.ELU, nn.SiLU, nn.Flatten)
_KEEPING += (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Identity,
)
