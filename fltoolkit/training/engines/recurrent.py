"""The peephole LSTM's forward and backward pass by hand, for a model that only plain SGD will train.

What does not wait for the step before is done for all steps at once. That leaves nine small operations a
step forward and five backward, where autograd needs about fifteen and forty; TorchScript runs through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fltoolkit.models.text import LanguageModel, PeepholeLstm
from fltoolkit.training.engines.script import scripted


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
        _run(gates, cells, hidden, squashed, u.t(), peephole)
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


def _run_forward(
    gates: Tensor, cells: Tensor, hidden: Tensor, squashed: Tensor, ut: Tensor, peephole: Tensor
) -> None:
    """Turn what the inputs give to `gates`, in place, into gates, and fill cells, hidden and tanh(cell)."""
    units = squashed.size(2)
    p_o, p_if = peephole[:units], peephole[units:].view(2, units)
    for t in range(squashed.size(0)):
        now, c = gates[t], cells[t + 1]
        now.flatten(1).addmm_(hidden[t], ut)
        now[:, 1:3].addcmul_(cells[t].unsqueeze(1), p_if).sigmoid_()
        torch.mul(now[:, 2], cells[t], out=c).addcmul_(now[:, 1], now[:, 3].tanh_())
        now[:, 0].addcmul_(c, p_o).sigmoid_()
        torch.mul(now[:, 0], torch.tanh(c, out=squashed[t]), out=hidden[t + 1])


def _run_backward(
    dz: Tensor, dh: Tensor, u: Tensor, by_dh: Tensor, to_dc: Tensor, by_dc: Tensor, kept: Tensor
) -> None:
    """Fill dz `[T, B, 4, units]` from the last step to the first."""
    last = dh.size(0) - 1
    dc = torch.zeros_like(dh[0])
    for k in range(last + 1):
        t = last - k
        now = dh[t] if k == 0 else torch.addmm(dh[t], dz[t + 1].flatten(1), u)
        torch.mul(now, by_dh[t], out=dz[t, :, 0])
        dc.addcmul_(now, to_dc[t])
        torch.mul(dc.unsqueeze(1), by_dc[t], out=dz[t, :, 1:])
        dc.mul_(kept[t])


_run, _run_back = scripted(_run_forward), scripted(_run_backward)


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
    _run_back(dz, dh, u, by_dh, to_dc, by_dc, kept)
    return dz


class _FastLstm(PeepholeLstm):
    def forward(self, x: Tensor) -> Tensor:
        time_major = x.transpose(0, 1).contiguous()
        h: Tensor = _Lstm.apply(time_major, self.input_weight, self.hidden_weight, self.bias, self.peephole)
        return h.transpose(0, 1)


class _TrimmedModel(LanguageModel):
    def forward(self, x: Tensor) -> Tensor:
        """Read up to the longest line's end; zeros for the padding that all lines share."""
        used = (x != self.padding).any(0).nonzero()
        steps = int(used[-1]) + 1 if len(used) else 1
        logits = super().forward(x[:, :steps])
        return F.pad(logits, (0, 0, 0, x.shape[1] - steps))


FASTER: dict[type[nn.Module], type[nn.Module]] = {PeepholeLstm: _FastLstm, LanguageModel: _TrimmedModel}


def speed_up(model: nn.Module) -> None:
    """Turn the recurrent layers and language models in `model`, in place, into these."""
    for layer in model.modules():
        if type(layer) in FASTER:
            layer.__class__ = FASTER[type(layer)]
