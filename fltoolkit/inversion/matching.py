"""Gradient matching: how far the gradient of a guessed batch is from the observed one.

Zhu, Liu, Han 2019, arXiv:1906.08935, eq. 3: D(x', y') = ‖∇_θ L(x', y') − g‖², the sum over all
parameters, for every row of a stack of guesses at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fltoolkit.errors import InputError
from fltoolkit.types import Observation

CHUNK_FLOATS = 2**25
"""Rows evaluated together hold at most this many gradient entries (128 MiB each for a few tensors)."""


class GradientMatching:
    """The matching loss of V observed problems, as a function of stacked guesses.

    Row s of a guess belongs to problem `owner[s]` and holds the flat inputs, then, where labels are
    optimised too (`labels` is None), the label logits `[N, classes]`. labels `[V, N]` fixes them.
    All observations must share architecture, batch size and input shape.
    """

    def __init__(self, observations: Sequence[Observation], owner: Tensor, labels: Tensor | None) -> None:
        first = observations[0]
        self.model, self.loss, self.layout = first.model, first.loss, first.layout
        self.batch, self.shape, self.classes = first.num_examples, first.input_shape, first.num_classes
        for o in observations[1:]:
            same = (o.layout, o.num_examples, o.input_shape) == (self.layout, self.batch, self.shape)
            if not same:
                raise InputError("observations attacked together must share model, batch and input shape")
        self.owner, self.labels = owner, labels
        self._params = torch.stack([o.params for o in observations])
        self._target = torch.stack([o.gradient for o in observations])
        buffers = [dict(o.model.named_buffers()) for o in observations]
        self._buffers = {n: torch.stack([b[n] for b in buffers]) for n in buffers[0]}
        self.inputs = self.batch * torch.Size(self.shape).numel()
        self._buffer = torch.empty(0)
        self._cached: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def variables(self) -> int:
        """n, the length of a guess."""
        return self.inputs + (self.batch * self.classes if self.labels is None else 0)

    @property
    def scale(self) -> Tensor:
        """‖g‖² of each problem `[V]`, the matching loss of a guess with zero gradient."""
        return self._target.square().sum(1)

    def decode(self, z: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses `[S, n]` -> x `[S, N, *shape]` and labels, `[S, N]` or distributions `[S, N, classes]`."""
        x = z[:, : self.inputs].reshape(len(z), self.batch, *self.shape)
        if self.labels is not None:
            return x, self.labels[owner]
        return x, z[:, self.inputs :].reshape(len(z), self.batch, self.classes).softmax(-1)

    def __call__(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Matching loss `[S]` and its gradient `[S, n]` at `z [S, n]`, row s of problem owner[rows[s]]."""
        chunk = max(1, CHUNK_FLOATS // self.layout.size)
        if len(z) <= chunk:
            return self._evaluate(z, *self._select(rows))
        parts = [
            self._evaluate(z[i : i + chunk], *self._gather(rows[i : i + chunk]))
            for i in range(0, len(z), chunk)
        ]
        losses, gradients = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def _select(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._cached is None or len(self._cached[0]) != len(rows) or not self._cached[0].equal(rows):
            self._cached = self._gather(rows)
        return self._cached

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        owner = self.owner[rows]
        return rows, self._params[owner], self._target[owner]

    def _evaluate(self, z: Tensor, rows: Tensor, params: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        owner = self.owner[rows]
        x, y = self.decode(z, owner)
        buffers = {n: b[owner] for n, b in self._buffers.items()}
        gradients = vmap(grad(self._batch_loss))(self.layout.unflatten(params), buffers, x, y)
        residual = self._residual(gradients, target)
        loss = torch.bmm(residual[:, None], residual[:, :, None]).flatten()
        # ∇_z ‖g(z) − t‖² = 2 (∂g/∂z)ᵀ (g(z) − t): the residual is the cotangent, no graph through the norm.
        cotangents = self.layout.unflatten(residual)
        (half,) = torch.autograd.grad(list(gradients.values()), z, [cotangents[n] for n in gradients])
        return loss, 2 * half

    def _residual(self, gradients: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """g − t `[S, D]`, in a buffer that evaluations share: fresh memory would cost more than the sum."""
        if self._buffer.shape != target.shape:
            self._buffer = torch.empty_like(target)
        wanted = self.layout.unflatten(target)
        for name, out in self.layout.unflatten(self._buffer).items():
            torch.sub(gradients[name].detach(), wanted[name], out=out)
        return self._buffer

    def _batch_loss(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> Tensor:
        logits = functional_call(self.model, (params, buffers), (x,))
        return self.loss(logits, y).mean()
