"""How well a model does on the test set."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fltoolkit.loss import IGNORE
from fltoolkit.metrics.interval import rate_interval
from fltoolkit.models import evaluating
from fltoolkit.training.engines import brief, recurrent
from fltoolkit.training.engines.fused import called_once
from fltoolkit.training.task import Task
from fltoolkit.types import Examples

BATCH_VALUES, BATCH_LINES = 1 << 17, 256
"""Values of images, or lines of tokens, that are evaluated at once, so that activations stay in the cache."""
GPU_TIMES = 64
"""That many times more on a GPU, which wants large operations."""


@dataclass(frozen=True)
class Evaluation:
    """correct of total predictions (one an example, or one a token that is not padding); loss: the mean
    over examples."""

    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def ci95(self) -> tuple[float, float]:
        """Clopper-Pearson; tokens of one line are not independent, so for text it is too narrow."""
        low, high = rate_interval(self.correct, self.total)["ci95"]
        return low, high


def evaluate(task: Task, params: Tensor, test: Examples) -> Evaluation:
    """Predictions whose largest logit is the label's, in evaluation mode, and the mean loss."""
    weights = {n: _channels_last(p) for n, p in task.layout.unflatten(params).items()}
    model = _faster(task.model, test.x[:1], task.local.precision == "bf16")
    correct, loss = 0, 0.0
    with evaluating(model), torch.no_grad():
        for x, y in _batches(test):
            logits = functional_call(model, weights, (_channels_last(x),))
            correct += int((logits.argmax(-1) == y).sum())
            loss += float(task.loss(logits, y).sum())
    return Evaluation(correct, int((test.y != IGNORE).sum()), loss / len(test))


def _faster(model: nn.Module, x: Tensor, short: bool) -> nn.Module:
    """A copy of `model` with faster layers that compute the same, or if `short` nearly so, in bfloat16; tried
    on the input x `[1, ...]`."""
    copy = deepcopy(model)
    recurrent.speed_up(copy)
    brief.shorten(copy, called_once(copy, x), brief.FROM if short else ())
    return copy


def _batches(test: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    """Lines of tokens come by length, so that a batch has little padding."""
    times = GPU_TIMES if test.x.is_cuda else 1
    if test.y.dim() == 1:
        batch = max(1, times * BATCH_VALUES // max(1, test.x[0].numel()))
        yield from zip(test.x.split(batch), test.y.split(batch), strict=True)
    else:
        for lines in (test.y != IGNORE).sum(1).argsort().split(times * BATCH_LINES):
            yield test.x[lines], test.y[lines]


def _channels_last(tensor: Tensor) -> Tensor:
    """Images and convolution kernels in the memory order in which pooling is fast on a CPU."""
    fast = tensor.dim() == 4 and tensor.device.type == "cpu"
    return tensor.contiguous(memory_format=torch.channels_last) if fast else tensor
