"""What enters BatchNorm's layers of a batch, and where an adversary has it from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fltoolkit.errors import InputError
from fltoolkit.types import Observation


class BatchNormStatistics:
    """Σ_l ‖μ_l(x) − μ̂_l‖₂ + ‖σ²_l(x) − σ̂²_l‖₂ over the BatchNorm layers l, whose inputs have means μ_l and
    variances σ²_l over the batch (Yin et al. 2021, arXiv:2104.07586, eq. 10).

    "sent": the batch's own, out of the buffers that a client sent along; "running": those of a trained model,
    which need not be the batch's, as Huang et al. 2021, arXiv:2112.00059, section 3, point out; "estimated":
    measured on public data at the parameters of the round. InputError where there is nothing to compare with.
    """

    SOURCES = ("sent", "running", "estimated")

    def __init__(self, observations: Sequence[Observation], source: str) -> None:
        first = observations[0]
        self.model, self.layout = first.model, first.layout
        self.layers = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        if not self.layers:
            raise InputError("statistics must be none for a model without BatchNorm2d layers, got " + source)
        if source != "estimated" and not all(m.track_running_stats for m in self.layers):
            raise InputError(f"statistics must not be {source} where a BatchNorm2d layer keeps none")
        self.targets = torch.stack([self._target(o, source) for o in observations])

    def __call__(self, x: Tensor, params: Tensor, owner: Tensor) -> Tensor:
        buffers = {n: b.expand(len(x), *b.shape).clone() for n, b in self.model.named_buffers()}
        found = vmap(self._of_batch)(params, buffers, x)
        sizes = [m.num_features for m in self.layers for _ in range(2)]
        pieces = (found - self.targets[owner]).split(sizes, dim=1)
        return torch.stack([(p.square().sum(1) + 1e-12).sqrt() for p in pieces]).sum(0)

    def _of_batch(self, params: Tensor, buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        """`[Σ 2 C_l]`: mean and variance, layer by layer, of what enters the layers at parameters `[D]` when
        the model sees the batch x `[N, *shape]`. Layers normalise as they do in the mode that the model is
        in."""
        seen: list[Tensor] = []
        for inputs in self._inputs(params, buffers, x):
            flat = inputs.transpose(0, 1).flatten(1)
            seen.extend((flat.mean(1), flat.var(1, correction=0)))
        return torch.cat(seen)

    def _inputs(self, params: Tensor, buffers: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        hooks = [m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for m in self.layers]
        try:
            functional_call(self.model, ({**self.layout.unflatten(params)}, buffers), (x,))
        finally:
            for h in hooks:
                h.remove()
        return seen

    def _target(self, o: Observation, source: str) -> Tensor:
        if source == "running":
            layers = [m for m in o.model.modules() if isinstance(m, nn.BatchNorm2d)]
            pairs = [(m.running_mean, m.running_var) for m in layers]
            return torch.cat([t for pair in pairs for t in pair if t is not None])
        if source == "sent":
            return self._of_buffers(o)
        if o.auxiliary is None:
            raise InputError("statistics=estimated must have public auxiliary data, got none")
        with torch.no_grad():
            return self._of_batch(o.params, _copies(o.model), o.auxiliary.x[:512].to(o.params))

    def _of_buffers(self, o: Observation) -> Tensor:
        """A layer of momentum a turns its running r into (1 − a) r + a s in one step, so s, the mean or the
        unbiased variance of the n inputs of a channel, is (r' − (1 − a) r) / a. Without a momentum, its k-th
        step has a = 1 / k. A frozen layer says nothing: its running statistics stand in."""
        if o.buffers is None:
            raise InputError("statistics=sent must have clients that send their buffers, got none")
        if o.local_steps > 1:
            raise InputError(f"statistics=sent must have clients of one local step, got {o.local_steps}")
        empty = torch.zeros(o.num_examples, *o.input_shape).to(o.params)
        with torch.no_grad():
            counts = [i.numel() / i.shape[1] for i in self._inputs(o.params, _copies(o.model), empty)]
        layers = [(n, m) for n, m in o.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        pieces = []
        for (name, layer), n in zip(layers, counts, strict=True):
            held = {key: o.buffers[f"{name}.{key}"] for key, _ in layer.named_buffers()}
            a = 1 / float(held["num_batches_tracked"]) if layer.momentum is None else layer.momentum
            for key, biased in (("running_mean", 1.0), ("running_var", (n - 1) / n)):
                before = layer.get_buffer(key)
                stepped = (held[key] - (1 - a) * before) / a * biased
                pieces.append(stepped if layer.training else before)
        return torch.cat(pieces)


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers()}
