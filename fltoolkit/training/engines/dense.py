"""SGD on fully connected networks of many clients at once, forward and backward by hand.

`train` is one TorchScript program, since a step is some twenty operations of a few microseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fltoolkit.training.engines.script import scripted


def _forward(h: Tensor, weight: Tensor, bias: Tensor, kind: str) -> Tensor:
    """σ(h Wᵀ + b) of h `[K, B, in]`, weight `[K, out, in]`, bias `[K, 1, out]`, or `[K, 0]` for none."""
    w = weight.transpose(1, 2)
    out = torch.bmm(h, w) if bias.numel() == 0 else torch.baddbmm(bias, h, w)
    if kind == "relu":
        return torch.relu_(out)
    if kind == "sigmoid":
        return torch.sigmoid_(out)
    return torch.tanh_(out) if kind == "tanh" else out


def _backward(d: Tensor, h: Tensor, kind: str) -> Tensor:
    """The gradient before an activation, from that after it and the activation's output h."""
    if kind == "relu":
        return torch.ops.aten.threshold_backward(d, h, 0)
    if kind == "sigmoid":
        return torch.ops.aten.sigmoid_backward(d, h)
    return torch.ops.aten.tanh_backward(d, h) if kind == "tanh" else d


def _step(w: Tensor, v: Tensor, d: Tensor, h: Tensor, lr: float, momentum: float, decay: float) -> None:
    """w ← w − η v, v ← μ v + dᵀ h + λ w, in one product; v `[K, 0]`: without momentum."""
    dt = d.transpose(1, 2)
    if v.numel() == 0:
        w.baddbmm_(dt, h, beta=1.0 - lr * decay, alpha=-lr)
    else:
        v.mul_(momentum).add_(w, alpha=decay).baddbmm_(dt, h)
        w.sub_(v, alpha=lr)


def _train(
    x: Tensor,
    y: Tensor,
    starts: list[int],
    width: int,
    scales: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    w_velocity: list[Tensor],
    b_velocity: list[Tensor],
    kinds: list[str],
    epochs: int,
    lr: float,
    momentum: float,
    decay: float,
) -> None:
    """Step weights and biases in place, under the mean cross-entropy of each batch.

    x `[K, n, in]`, y `[K, n]`, or distributions `[K, n, classes]`. Batch i is the `width` examples from
    `starts[i]` on, of the clients that have any; scales[i] `[active, at most width, 1]` is 1 / (examples a
    client has of it), 0 for what it has not.
    """
    for _ in range(epochs):
        for i in range(len(starts)):
            scale, b = scales[i], starts[i]
            a = scale.size(0)
            hidden = [x[:a, b : b + width]]
            for k in range(len(weights)):
                hidden.append(_forward(hidden[-1], weights[k][:a], biases[k][:a], kinds[k]))
            d = torch.softmax(hidden.pop(), -1)
            ones = torch.ones_like(scale)
            labels = y[:a, b : b + width]
            if labels.dim() == 3:
                d.mul_(labels.sum(-1, keepdim=True)).sub_(labels)
            else:
                d.scatter_add_(2, labels.unsqueeze(2), -ones)
            d.mul_(scale)
            for j in range(len(weights)):
                k = len(weights) - 1 - j
                h, w = hidden[k], weights[k][:a]
                below = torch.bmm(d, w) if k > 0 else d
                _step(w, w_velocity[k][:a], d, h, lr, momentum, decay)
                if biases[k].numel() > 0:
                    _step(biases[k][:a], b_velocity[k][:a], ones, d, lr, momentum, decay)
                if k > 0:
                    d = _backward(below, h, kinds[k - 1])


train = scripted(_train)
