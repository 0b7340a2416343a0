"""The peephole LSTM's steps through the compiled kernels, in float32 or with its products in bfloat16.

A step's product, gates and state are done vector by vector while its sums are in registers, or in the
processor's tiles; gradients by bias and peepholes add up on the way back. The products that do not wait for
the step before are PyTorch's, for all steps at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fltoolkit.models.text import PeepholeLstm
from fltoolkit.training.engines import native
from fltoolkit.training.engines.native import LANES

PAIRS = 16
"""Of numbers in bfloat16, in a row of a tile."""


def fits(layer: PeepholeLstm, x: Tensor) -> bool:
    """Whether the kernels can be had and take this layer and its time-major x."""
    return layer.units % LANES == 0 and native.fits(x, *layer.parameters())


def tiles_fit(units: int) -> bool:
    """Whether there are tiles in which a layer of as many units can multiply in bfloat16."""
    return units % (4 * LANES) == 0 and native.tiles()


class Steps(torch.autograd.Function):
    """`PeepholeLstm.forward` on time-major x `[T, B, inputs]`, to the hidden states `[T, B, units]`.

    short: round what goes into products to bfloat16. Sums over a step's units stay in float32; the other
    products are rounded too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, u: Tensor, bias: Tensor, peephole: Tensor, short: bool
    ) -> Tensor:
        shape, x = x.shape[:2], x.flatten(0, 1)
        if short:
            x, w = x.bfloat16(), w.bfloat16()
        kept, hidden, states = run((x @ w.mT).view(*shape, -1), u, bias, peephole)
        ctx.save_for_backward(x, w, u, peephole, states, *kept)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, None]:
        x, w, u, peephole, states, *kept = ctx.saved_tensors
        dwx, d_bias, d_peephole = run_back(dh.contiguous(), u, peephole, *kept, dtype=x.dtype)
        d, before = dwx.flatten(0, 1), states[:-1].flatten(0, 1)
        dx = (d @ w).float().view(*dh.shape[:2], -1) if ctx.needs_input_grad[0] else None
        return dx, (d.mT @ x).float(), (d.mT @ before).float(), d_bias, d_peephole, None


Kept = tuple[Tensor, Tensor, Tensor]
"""Gates `[T, B, 4, units]` in the order o, i, f, g, cells `[T + 1, B, units]` with the zero start first, and
tanh(cell) `[T, B, units]`."""


def run(wx: Tensor, u: Tensor, bias: Tensor, peephole: Tensor) -> tuple[Kept, Tensor, Tensor]:
    """From W x `[T, B, 4 units]`, in bfloat16 where the recurrent products shall be: what the way back needs,
    hidden states `[T, B, units]`, and these in the products' numbers with the zero start first. In float32
    the gates overwrite W x."""
    steps, n, units = *wx.shape[:2], u.shape[1]
    cells, states = u.new_empty(steps + 1, n, units), wx.new_empty(steps + 1, n, units)
    cells[0], states[0] = 0, 0
    squashed = u.new_empty(steps, n, units)
    if wx.dtype == torch.bfloat16:
        gates, hidden = u.new_empty(steps, n, 4, units), torch.empty_like(squashed)
        pairs = u.bfloat16().view(torch.int32).view(4, -1, LANES, units // (2 * PAIRS), PAIRS)
        given = pairs.permute(1, 3, 0, 4, 2).contiguous(), bias, peephole, wx
        native.call("fl_lstm_short", *given, steps, n, units, gates, cells, squashed, hidden, states)
    else:
        gates, hidden = wx.view(steps, n, 4, units), states[1:]
        by_lane = u.view(4, -1, LANES, units).permute(1, 3, 0, 2).contiguous()
        native.call("fl_lstm", by_lane, bias, peephole, steps, n, units, gates, cells, squashed, states)
    return (gates, cells, squashed), hidden, states


def run_back(
    dh: Tensor, u: Tensor, peephole: Tensor, *kept: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by W x `[T, B, 4 units]` in `dtype`, which is that of the products, by bias and by peephole,
    from that by the hidden states `[T, B, units]` and what `run` kept."""
    steps, n, units = dh.shape
    short, name = dtype == torch.bfloat16, "fl_lstm_back"
    if short:
        parts = u.bfloat16().view(-1, PAIRS, 2, units // (4 * LANES), 4, LANES)
        u, name = parts.permute(3, 0, 4, 1, 5, 2).contiguous(), "fl_lstm_back_short"
    dc, by, dwx = (
        dh.new_zeros(n, units),
        dh.new_zeros(7, units),
        dh.new_empty(steps, n, 4 * units, dtype=dtype),
    )
    native.call(name, u, peephole, dh, *kept, steps, n, units, dc, by, dwx)
    return dwx, by[:4].flatten(), by[4:].flatten()
