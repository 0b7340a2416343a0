"""The peephole LSTM's steps through the compiled kernels, in float32 or with its products in bfloat16.

A step's product, gates and state are done vector by vector while its sums are in registers, or in the
processor's tiles; gradients by bias and peepholes add up on the way back. The products that do not wait for
the step before are PyTorch's, for all steps at once. Lines may end at different steps: the longest come
first, a step has those that go on, and arrays hold the rows of one step after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fltoolkit.models.text import PeepholeLstm
from fltoolkit.training.engines import native
from fltoolkit.training.engines.native import LANES

PAIRS = 16
"""Of numbers in bfloat16, in a row of a tile."""


def fits(layer: PeepholeLstm) -> bool:
    """Whether the kernels can be had and take this layer."""
    return layer.units % LANES == 0 and native.fits(*layer.parameters())


def tiles_fit(units: int) -> bool:
    """Whether there are tiles in which a layer of as many units can multiply in bfloat16."""
    return units % (4 * LANES) == 0 and native.tiles()


@dataclass(frozen=True)
class Lines:
    """n lines, of which step t has the first `count[t]` `[T]`, never more than the step before. Arrays may
    have more rows than all steps together; those after them are zeros."""

    n: int
    count: Tensor

    @staticmethod
    def alike(n: int, steps: int) -> Lines:
        return Lines(n, torch.full((steps,), n))

    @cached_property
    def rows(self) -> int:
        """Of all steps."""
        return int(self.count.sum())

    def before(self, states: Tensor) -> Tensor:
        """Of states `[n + rows, units]`, the start's first, those before each row's step."""
        if int(self.count[-1]) == self.n:
            return states[: len(states) - self.n]
        beyond = len(states) - self.n - self.rows
        earlier = torch.cat([torch.tensor([self.n]), self.count[:-1]])
        at = torch.arange(self.n, self.n + self.rows) - earlier.repeat_interleave(self.count)
        return states[F.pad(at, (0, beyond))]


class Steps(torch.autograd.Function):
    """`PeepholeLstm.forward` on the rows x `[rows, inputs]` of `lines`, to hidden states `[rows, units]`.

    short: round what goes into products to bfloat16. Sums over a step's units stay in float32; the other
    products are rounded too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        u: Tensor,
        bias: Tensor,
        peephole: Tensor,
        lines: Lines,
        short: bool,
    ) -> Tensor:
        if short:
            x, w = x.bfloat16(), w.bfloat16()
        kept, hidden, states = run(x @ w.mT, u, bias, peephole, lines)
        ctx.save_for_backward(x, w, u, peephole, states, *kept)
        ctx.lines = lines
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, w, u, peephole, states, *kept = ctx.saved_tensors
        lines: Lines = ctx.lines
        d, d_bias, d_peephole = run_back(dh.contiguous(), u, peephole, lines, *kept, dtype=x.dtype)
        dx = (d @ w).float() if ctx.needs_input_grad[0] else None
        return dx, (d.mT @ x).float(), (d.mT @ lines.before(states)).float(), d_bias, d_peephole, None, None


Kept = tuple[Tensor, Tensor, Tensor]
"""Gates `[rows, 4, units]` in the order o, i, f, g, cells `[n + rows, units]` with the zero start first, and
tanh(cell) `[rows, units]`."""


def run(wx: Tensor, u: Tensor, bias: Tensor, peephole: Tensor, lines: Lines) -> tuple[Kept, Tensor, Tensor]:
    """From W x `[rows, 4 units]`, in bfloat16 where the recurrent products shall be: what the way back
    needs, hidden states `[rows, units]`, and these in the products' numbers with the zero start first. In
    float32 the gates overwrite W x."""
    n, units, rows = lines.n, u.shape[1], len(wx)
    cells, states = u.new_empty(n + rows, units), wx.new_empty(n + rows, units)
    cells[:n], states[:n] = 0, 0
    states[n + lines.rows :] = 0
    squashed, size = u.new_empty(rows, units), (len(lines.count), n, units)
    if wx.dtype == torch.bfloat16:
        gates, hidden = u.new_empty(rows, 4, units), torch.empty_like(squashed)
        hidden[lines.rows :] = 0
        pairs = u.bfloat16().view(torch.int32).view(4, -1, LANES, units // (2 * PAIRS), PAIRS)
        tiled = pairs.permute(1, 3, 0, 4, 2).contiguous()
        given, found = (tiled, bias, peephole, lines.count, wx), (gates, cells, squashed, hidden, states)
        native.call("fl_lstm_short", *given, *size, *found)
    else:
        gates, hidden = wx.view(rows, 4, units), states[n:]
        by_lane = u.view(4, -1, LANES, units).permute(1, 3, 0, 2).contiguous()
        native.call("fl_lstm", by_lane, bias, peephole, lines.count, *size, gates, cells, squashed, states)
    return (gates, cells, squashed), hidden, states


def run_back(
    dh: Tensor, u: Tensor, peephole: Tensor, lines: Lines, *kept: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by W x `[rows, 4 units]` in `dtype`, which is that of the products, by bias and by peephole,
    from that by the hidden states `[rows, units]` and what `run` kept."""
    (rows, units), name = dh.shape, "fl_lstm_back"
    if dtype == torch.bfloat16:
        parts = u.bfloat16().view(-1, PAIRS, 2, units // (4 * LANES), 4, LANES)
        u, name = parts.permute(3, 0, 4, 1, 5, 2).contiguous(), "fl_lstm_back_short"
    dc, by = dh.new_zeros(lines.n, units), dh.new_zeros(7, units)
    dwx = dh.new_empty(rows, 4 * units, dtype=dtype)
    dwx[lines.rows :] = 0
    given = u, peephole, lines.count, dh, *kept
    native.call(name, *given, len(lines.count), lines.n, units, dc, by, dwx)
    return dwx, by[:4].flatten(), by[4:].flatten()
