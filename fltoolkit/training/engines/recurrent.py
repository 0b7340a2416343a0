"""The peephole LSTM's forward and backward pass by hand, for a model that only plain SGD will train.

What does not wait for the step before is done for all steps at once. That leaves nine small operations a
step forward and five backward, where autograd needs about fifteen and forty.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fltoolkit.models.text import LanguageModel, PeepholeLstm


class _Lstm(torch.autograd.Function):
    """`PeepholeLstm.forward` on time-major x `[T, B, inputs]`, to h `[T, B, units]`.

    Gates are kept as g `[T, B, 4, units]` in the order o, i, f, g; cells and hidden states as `[T + 1, ...]`
    with the zero start first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, u: Tensor, bias: Tensor, peephole: Tensor) -> Tensor:
        steps, batch, units = len(x), x.shape[1], u.shape[1]
        gates = torch.addmm(bias, x.flatten(0, 1), w.t()).view(steps, batch, 4, units)
        cells, hidden = x.new_empty(steps + 1, batch, units), x.new_empty(steps + 1, batch, units)
        cells[0], hidden[0] = 0, 0
        squashed = x.new_empty(steps, batch, units)
        p_o, p_if = peephole[:units], peephole[units:].view(2, units)
        z, ut = gates.flatten(2).unbind(), u.t()
        pairs, seen = gates[:, :, 1:3].unbind(), cells.unsqueeze(2).unbind()
        o, i, f, g = (gates[:, :, k].unbind() for k in range(4))
        c, h, tanh_c = cells.unbind(), hidden.unbind(), squashed.unbind()
        for t in range(steps):
            z[t].addmm_(h[t], ut)
            pairs[t].addcmul_(seen[t], p_if).sigmoid_()
            torch.mul(f[t], c[t], out=c[t + 1]).addcmul_(i[t], g[t].tanh_())
            o[t].addcmul_(c[t + 1], p_o).sigmoid_()
            torch.mul(o[t], torch.tanh(c[t + 1], out=tanh_c[t]), out=h[t + 1])
        ctx.save_for_backward(x, w, u, peephole, gates, cells, hidden, squashed)
        return hidden[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        x, w, u, peephole, gates, cells, hidden, squashed = ctx.saved_tensors
        dz = _through_time(dh, u, peephole, gates, cells[:-1], hidden[1:], squashed)
        flat, units = dz.view(-1, 4 * u.shape[1]), u.shape[1]
        d_peephole = torch.stack(
            [
                (dz[:, :, 0] * cells[1:]).sum((0, 1)),
                (dz[:, :, 1] * cells[:-1]).sum((0, 1)),
                (dz[:, :, 2] * cells[:-1]).sum((0, 1)),
            ]
        )
        return (
            (flat @ w).view_as(x) if ctx.needs_input_grad[0] else None,
            flat.t() @ x.flatten(0, 1),
            flat.t() @ hidden[:-1].reshape(-1, units),
            flat.sum(0),
            d_peephole.flatten(),
        )


def _through_time(
    dh: Tensor,
    u: Tensor,
    peephole: Tensor,
    gates: Tensor,
    cells: Tensor,
    hidden: Tensor,
    squashed: Tensor,
) -> Tensor:
    """Gradient by z, `[T, B, 4, units]`, from the gradient by h, `[T, B, units]`; cells before each step,
    hidden after it, squashed = tanh(cell after it).

    Every gate's gradient is the step's dh or dc times a factor known beforehand, such as
    ∂h/∂z_o = o (1 − o) tanh(c) and ∂c/∂z_i = i (1 − i) g.
    """
    p_o, p_i, p_f = peephole.chunk(3)
    o, i, f, g = gates.unbind(2)
    by_dh = torch.addcmul(o, o, o, value=-1).mul_(squashed)
    to_dc = torch.addcmul(o, hidden, squashed, value=-1).addcmul_(by_dh, p_o)
    by_dc = gates.new_empty(*gates.shape[:2], 3, gates.shape[3])
    torch.addcmul(gates[:, :, 1:3], gates[:, :, 1:3], gates[:, :, 1:3], value=-1, out=by_dc[:, :, :2])
    by_dc[:, :, 0].mul_(g)
    by_dc[:, :, 1].mul_(cells)
    torch.addcmul(i, i * g, g, value=-1, out=by_dc[:, :, 2])
    kept = torch.addcmul(f, by_dc[:, :, 0], p_i).addcmul_(by_dc[:, :, 1], p_f)
    dz = torch.empty_like(gates)
    dz_o, dz_ifg, flat = dz[:, :, 0].unbind(), dz[:, :, 1:].unbind(), dz.flatten(2).unbind()
    given, by_dh_t, to_dc_t, by_dc_t, kept_t = (s.unbind() for s in (dh, by_dh, to_dc, by_dc, kept))
    dc = torch.zeros_like(dh[0])
    dc_ifg, last = dc[:, None], len(dh) - 1
    for t in range(last, -1, -1):
        now = given[t] if t == last else torch.addmm(given[t], flat[t + 1], u)
        torch.mul(now, by_dh_t[t], out=dz_o[t])
        dc.addcmul_(now, to_dc_t[t])
        torch.mul(dc_ifg, by_dc_t[t], out=dz_ifg[t])
        dc.mul_(kept_t[t])
    return dz


def speed_up(model: nn.Module) -> None:
    """Swap the forward pass of the recurrent layers and language models in `model`, in place, for these."""
    for layer in model.modules():
        if type(layer) is PeepholeLstm:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
        elif type(layer) is LanguageModel:
            layer.forward = partial(_trimmed, layer)  # type: ignore[method-assign]


def fast(model: nn.Module) -> nn.Module:
    """A copy of `model` with the faster forward pass, or `model` itself where nothing is to be swapped."""
    if not any(type(m) in (PeepholeLstm, LanguageModel) for m in model.modules()):
        return model
    copy = deepcopy(model)
    speed_up(copy)
    return copy


def _forward(layer: PeepholeLstm, x: Tensor) -> Tensor:
    time_major = x.transpose(0, 1).contiguous()
    h: Tensor = _Lstm.apply(time_major, layer.input_weight, layer.hidden_weight, layer.bias, layer.peephole)
    return h.transpose(0, 1)


def _trimmed(model: LanguageModel, x: Tensor) -> Tensor:
    """Read up to the longest line's end; zeros for the padding that all lines share."""
    used = (x != model.padding).any(0).nonzero()
    steps = int(used[-1]) + 1 if len(used) else 1
    logits = model.out(model.layers(model.embedding(x[:, :steps])))
    return F.pad(logits, (0, 0, 0, x.shape[1] - steps))
