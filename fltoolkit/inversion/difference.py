"""The slope of a matching objective by one difference of input gradients, in place of a second backward pass.

A distance d(g) of the gradient g = ∇_w ℓ(w; z) has the slope (∂g/∂z)ᵀ v in the guess z, with v = ∂d/∂g. Mixed
derivatives commute, so that is the derivative of ∇_z ℓ along v in the parameters, and

    [∇_z ℓ(w + ε v; z) − ∇_z ℓ(w; z)] / ε

costs one more pass forwards and one backwards to the input, where double backward walks the whole graph of
both passes again. At a kink ∇_z ℓ jumps, and thousands of small jumps would drown the difference; so the
second pass takes the branches of ReLUs and max poolings that the first one took, as double backward does. A
model that calls anything else that is not known to be smooth is left to double backward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fltoolkit.inversion.client import State
from fltoolkit.types import Loss

STEP = 5e-4
"""Length of the step ε v, in lengths of w. A longer one bends, a shorter one is rounding noise."""

ROUGH = 0.05
"""Relative error above which a difference is not the slope: the model hides kinks that are not followed."""

_RELU = {torch.relu, torch.relu_, F.relu, F.relu_, Tensor.relu, Tensor.relu_}
_POOL = {torch.max_pool2d, F.max_pool2d}
_SMOOTH = re.compile(
    r"conv\dd|linear|bilinear|matmul|__matmul__|mm|bmm|einsum|embedding"
    r"|(batch|instance|layer|group|rms)_norm|local_response_norm|(adaptive_)?avg_pool\dd"
    r"|sigmoid|tanh|gelu|silu|mish|elu|softplus|logsigmoid|(log_)?softmax|cross_entropy|nll_loss"
    r"|mean|sum|add_?|sub|mul|div|neg|square|exp|log|sin|cos|__[ri]?(add|sub|mul|truediv)__|__neg__"
    r"|(un)?flatten|view|reshape|permute|transpose|contiguous|(un)?squeeze|expand|chunk|split|cat|stack|pad|flip"
    r"|clone|to|float|__getitem__|__get__|dim|size|numel|arange|empty|zeros|ones"
)


class Branches(TorchFunctionMode):
    """While it is entered, notes the branch that every ReLU and 2D max pooling takes, in `taken`; one made of
    such notes makes them take those branches again. strange: what was called that may have other kinks."""

    def __init__(self, taken: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.taken: list[Tensor] = []
        self.strange: set[str] = set()
        self._again = None if taken is None else iter(taken)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _RELU:
            return self._relu(args[0])
        if func in _POOL:
            return self._pool(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if not _SMOOTH.fullmatch(name):
            self.strange.add(name)
        return func(*args, **(kwargs or {}))

    def _relu(self, x: Tensor) -> Tensor:
        if self._again is not None:
            return x * next(self._again)
        y = torch.relu(x)
        self.taken.append(y.detach() > 0)
        return y

    def _pool(self, x: Tensor, *args: Any, return_indices: bool = False, **kwargs: Any) -> Tensor:
        if self._again is not None:
            at = next(self._again)
            return x.flatten(-2).gather(-1, at.flatten(-2)).view(at.shape)
        y, at = F.max_pool2d_with_indices(x, *args, **kwargs)
        self.taken.append(at)
        return y


class Difference:
    """The two passes over one guess, whose inputs x and labels y depend on z."""

    def __init__(self, model: nn.Module, loss: Loss, params: State, buffers: State) -> None:
        self.model, self.loss, self.params, self.buffers = model, loss, params, buffers
        self.branches: list[Tensor] = []
        self.before = torch.empty(0)

    @torch.no_grad()
    def followed(self, x: Tensor, y: Tensor) -> bool:
        """Whether every kink that the model is seen to have is followed."""
        with Branches() as seen:
            self._value(self.params, x, y)
        return not seen.strange

    def first(self, x: Tensor, y: Tensor, z: Tensor) -> State:
        """The gradient g by the parameters; that by z is kept."""
        with Branches() as seen:
            value = self._value(self.params, x, y)
        self.branches = seen.taken
        *found, self.before = torch.autograd.grad(value, [*self.params.values(), z])
        return dict(zip(self.params, found, strict=True))

    def slope(self, v: State, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """(∂g/∂z)ᵀ v, in the shape of z."""
        length = _length(v)
        if not length > 0:
            return torch.zeros_like(z)
        step = STEP * _length(self.params) / length
        with torch.no_grad():
            moved = torch._foreach_add(list(self.params.values()), list(v.values()), alpha=step)
        with Branches(self.branches):
            value = self._value(dict(zip(self.params, moved, strict=True)), x, y)
        (after,) = torch.autograd.grad(value, z)
        return (after - self.before) / step

    def _value(self, params: State, x: Tensor, y: Tensor) -> Tensor:
        buffers = {n: b.clone() for n, b in self.buffers.items()}
        return self.loss(functional_call(self.model, (params, buffers), (x,)), y).mean()


def _length(state: State) -> float:
    return float(torch.stack(torch._foreach_norm([t.detach() for t in state.values()])).norm())
