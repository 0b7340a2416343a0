"""Fully connected networks on CPUs: a client's whole local training is one call into `kernels.c`.

No batching over clients and no padding: a core takes one client after the other, whose weights then stay in
that core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit.training.engines import native
from fltoolkit.training.engines.base import Engine, each_on_its_core, visiting
from fltoolkit.training.engines.batched import Batched, linear_layers
from fltoolkit.types import Examples, LocalSpec, Loss


class Compiled(Engine):
    """The networks of `Batched`, in float32 on a CPU, where a C compiler is at hand."""

    name = "compiled"
    about = "linear layers with activations, on CPUs with a C compiler: one call a client"

    @classmethod
    def refuses(cls, model: nn.Module, loss: Loss, input_shape: tuple[int, ...]) -> str | None:
        if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
            return "its parameters are not float32 on a CPU"
        if native.library() is None:
            return f"there is no C compiler that can build its kernels, or {native.SWITCH} is 0"
        return Batched.refuses(model, loss, input_shape)

    def __call__(
        self,
        params: Tensor,
        data: Sequence[Examples],
        local: LocalSpec,
        rngs: Sequence[np.random.Generator],
    ) -> Tensor:
        if any(d.y.is_floating_point() for d in data):
            # The kernels know classes alone; distributions over them come from defenses that mix examples.
            return Batched(self.model, self.loss)(params, data, local, rngs)
        rows = params.new_empty(len(data), params.numel())
        names, kinds = linear_layers(self.model)

        def layers(row: Tensor) -> list[tuple[Tensor, Tensor | None]]:
            parts = self.layout.unflatten(row)
            return [(parts[f"{n}.weight"], parts.get(f"{n}.bias")) for n in names]

        def train(k: int) -> None:
            row, (x, y) = rows[k].copy_(params), (data[k].x.flatten(1), data[k].y)
            native.train_dense(
                x.float().contiguous(),
                y.contiguous(),
                visiting(len(x), local, rngs[k]),
                local.batch or len(x),
                local.epochs,
                layers(row),
                kinds,
                layers(torch.zeros_like(params)) if local.momentum else [],
                local.lr,
                local.momentum,
                local.weight_decay,
            )
            row.sub_(params)

        each_on_its_core(train, range(len(data)), min(torch.get_num_threads(), len(data)))
        return rows
