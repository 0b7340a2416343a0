"""The peephole LSTM's forward and backward pass by hand, for a model that only plain SGD will train.

What does not wait for the step before is done for all steps at once. The rest runs through compiled kernels
(`native_lstm`) where they can be had. Elsewhere it is nine small operations a step forward and five backward,
where autograd needs about fifteen and forty; TorchScript runs through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fltoolkit.models.text import LanguageModel, PeepholeLstm
from fltoolkit.training.engines import native_lstm
from fltoolkit.training.engines.script import scripted

ROWS = 32
"""Rows of lines are filled up to a multiple of as many, since oneDNN compiles products for each size anew."""

Kept = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of T steps: hidden states and cells `[T + 1, *, B, units]` with the zero start first, gates
`[T, *, B, 4, units]` in the order o, i, f, g, and tanh(cell) `[T, *, B, units]`; * is nothing, or clients."""


class _Lstm(torch.autograd.Function):
    """`PeepholeLstm.forward` on time-major x `[T, B, inputs]`, to the hidden states `[T + 1, B, units]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, u: Tensor, bias: Tensor, peephole: Tensor) -> Tensor:
        kept = _forward(x, w, u, bias, peephole)
        ctx.save_for_backward(x, w, u, peephole, *kept)
        return kept[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        dx, *others = _backward(dh, *ctx.saved_tensors)
        dw, du, db, dp = others
        return dx if ctx.needs_input_grad[0] else None, dw, du, db, dp


class _ClientsLstm(torch.autograd.Function):
    """The same under `torch.func.vmap` over clients, each with its own x and parameters, as one program."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, u: Tensor, bias: Tensor, peephole: Tensor) -> Kept:
        return _forward(x, w, u, bias, peephole)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Kept) -> None:
        x, w, u, _, peephole = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, w, u, peephole, *output)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(_ClientsBack.apply(dh, *ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *given: Tensor) -> tuple[Kept, tuple[int, ...]]:
        x, *params = _clients_first(info.batch_size, dims, given)
        return _forward(x.transpose(0, 1), *params), (1, 1, 1, 1)


class _ClientsBack(torch.autograd.Function):
    """The backward pass of `_ClientsLstm`."""

    @staticmethod
    def forward(*given: Tensor) -> tuple[Tensor, ...]:
        dh, x, w, u, peephole, hidden, cells, gates, squashed = given
        return _backward(dh, x, w, u, peephole, hidden, cells, gates, squashed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None: ...

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], *given: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dh, x, w, u, peephole, *kept = _clients_first(info.batch_size, dims, given)
        dh, x, hidden, cells, gates, squashed = (t.transpose(0, 1) for t in (dh, x, *kept))
        return _backward(dh, x, w, u, peephole, hidden, cells, gates, squashed), (1, 0, 0, 0, 0)


def _clients_first(count: int, dims: Sequence[int | None], given: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with the clients' dimension first, repeated where there is none."""
    return [
        t.expand(count, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(given, dims, strict=True)
    ]


def _forward(x: Tensor, w: Tensor, u: Tensor, bias: Tensor, peephole: Tensor) -> Kept:
    """x `[T, *, B, inputs]`, w `[*, 4 units, inputs]`, u `[*, 4 units, units]`, the others `[*, ...]`."""
    units, shape = u.shape[-1], x.shape[:-1]
    z = _by_client(x) @ w.mT
    gates = _by_time(z.add_(bias.unsqueeze(-2)), shape[0]).unflatten(-1, (4, units))
    hidden, cells = (x.new_empty(shape[0] + 1, *shape[1:], units) for _ in range(2))
    hidden[0], cells[0] = 0, 0
    squashed = x.new_empty(*shape, units)
    run = _run_forward if x.is_cuda else _scripted_forward  # on a GPU the engine records what is launched
    run(gates, cells, hidden, squashed, u.mT, peephole.unsqueeze(-2))
    return hidden, cells, gates, squashed


def _backward(
    dh: Tensor,
    x: Tensor,
    w: Tensor,
    u: Tensor,
    peephole: Tensor,
    hidden: Tensor,
    cells: Tensor,
    gates: Tensor,
    squashed: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients by x, w, u, bias and peephole from that by the hidden states; shapes as in `Kept`."""
    before, after = cells[:-1], cells[1:]
    dz = _through_time(dh[1:], u, peephole.unsqueeze(-2), gates, before, hidden[1:], squashed)
    flat = dz.flatten(-2)
    d_peephole = torch.cat(
        [(dz.select(-2, i) * c).sum((0, -2)) for i, c in ((0, after), (1, before), (2, before))], -1
    )
    d = _by_client(flat)
    return (
        _by_time(d @ w, len(x)),
        d.mT @ _by_client(x),
        d.mT @ _by_client(hidden[:-1]),
        flat.sum((0, -2)),
        d_peephole,
    )


def _by_client(t: Tensor) -> Tensor:
    """`[T, *, B, n]` as `[*, T B, n]`."""
    return t.movedim(0, -3).flatten(-3, -2)


def _by_time(t: Tensor, steps: int) -> Tensor:
    """`[*, T B, n]` as `[T, *, B, n]`."""
    return t.unflatten(-2, (steps, -1)).movedim(-3, 0).contiguous()


def _run_forward(
    gates: Tensor, cells: Tensor, hidden: Tensor, squashed: Tensor, ut: Tensor, peephole: Tensor
) -> None:
    """Turn what the inputs give to `gates`, in place, into gates, and fill cells, hidden and tanh(cell)."""
    units = squashed.size(-1)
    p_o = peephole.narrow(-1, 0, units)
    p_if = peephole.narrow(-1, units, 2 * units).unflatten(-1, [2, units])
    for t in range(squashed.size(0)):
        now, c = gates[t], cells[t + 1]
        flat = now.flatten(-2)
        if flat.dim() == 2:
            flat.addmm_(hidden[t], ut)
        else:
            flat.baddbmm_(hidden[t], ut)
        now.narrow(-2, 1, 2).addcmul_(cells[t].unsqueeze(-2), p_if).sigmoid_()
        f, i = now.select(-2, 2), now.select(-2, 1)
        torch.mul(f, cells[t], out=c).addcmul_(i, now.select(-2, 3).tanh_())
        now.select(-2, 0).addcmul_(c, p_o).sigmoid_()
        torch.mul(now.select(-2, 0), torch.tanh(c, out=squashed[t]), out=hidden[t + 1])


def _run_backward(
    dz: Tensor, dh: Tensor, u: Tensor, by_dh: Tensor, to_dc: Tensor, by_dc: Tensor, kept: Tensor
) -> None:
    """Fill dz `[T, *, B, 4, units]` from the last step to the first."""
    last = dh.size(0) - 1
    dc = torch.zeros_like(dh[0])
    for k in range(last + 1):
        t = last - k
        now = dh[t]
        if k > 0:
            d = dz[t + 1].flatten(-2)
            now = torch.addmm(now, d, u) if d.dim() == 2 else torch.baddbmm(now, d, u)
        torch.mul(now, by_dh[t], out=dz[t].select(-2, 0))
        dc.addcmul_(now, to_dc[t])
        torch.mul(dc.unsqueeze(-2), by_dc[t], out=dz[t].narrow(-2, 1, 3))
        dc.mul_(kept[t])


_scripted_forward, _scripted_backward = scripted(_run_forward), scripted(_run_backward)


def _through_time(
    dh: Tensor,
    u: Tensor,
    peephole: Tensor,
    gates: Tensor,
    cells: Tensor,
    hidden: Tensor,
    squashed: Tensor,
) -> Tensor:
    """Gradient by z, `[T, *, B, 4, units]`, from the gradient by h, `[T, *, B, units]`; cells before each
    step, hidden after it, squashed = tanh(cell after it).

    Every gate's gradient is the step's dh or dc times a factor known beforehand, such as
    ∂h/∂z_o = o (1 − o) tanh(c) and ∂c/∂z_i = i (1 − i) g.
    """
    p_o, p_i, p_f = peephole.chunk(3, -1)
    o, i, f, g = gates.unbind(-2)
    by_dh = torch.addcmul(o, o, o, value=-1).mul_(squashed)
    to_dc = torch.addcmul(o, hidden, squashed, value=-1).addcmul_(by_dh, p_o)
    middle = gates.narrow(-2, 1, 2)
    by_dc = gates.new_empty(*gates.shape[:-2], 3, gates.shape[-1])
    torch.addcmul(middle, middle, middle, value=-1, out=by_dc.narrow(-2, 0, 2))
    by_dc.select(-2, 0).mul_(g)
    by_dc.select(-2, 1).mul_(cells)
    torch.addcmul(i, i * g, g, value=-1, out=by_dc.select(-2, 2))
    kept = torch.addcmul(f, by_dc.select(-2, 0), p_i).addcmul_(by_dc.select(-2, 1), p_f)
    dz = torch.empty_like(gates)
    run = _run_backward if dh.is_cuda else _scripted_backward
    run(dz, dh, u, by_dh, to_dc, by_dc, kept)
    return dz


class FastLstm(PeepholeLstm):
    """short: multiply in bfloat16 (`native_lstm`)."""

    short = False

    def forward(self, x: Tensor) -> Tensor:
        time_major = x.transpose(0, 1).contiguous()
        if native_lstm.fits(self):
            lines = native_lstm.Lines.alike(*x.shape[:2])
            h = self.on_rows(time_major.flatten(0, 1), lines).view(*time_major.shape[:2], -1)
        else:
            h = _Lstm.apply(time_major, *self._params())[1:]
        return h.transpose(0, 1)

    def on_rows(self, x: Tensor, lines: native_lstm.Lines) -> Tensor:
        """From the rows of `lines` `[rows, inputs]` to their hidden states `[rows, units]`, natively."""
        h: Tensor = native_lstm.Steps.apply(x, *self._params(), lines, self.short)
        return h

    def _params(self) -> tuple[Tensor, ...]:
        return self.input_weight, self.hidden_weight, self.bias, self.peephole


class _VmappedLstm(PeepholeLstm):
    def forward(self, x: Tensor) -> Tensor:
        params = self.input_weight, self.hidden_weight, self.bias, self.peephole
        h: Tensor = _ClientsLstm.apply(x.transpose(0, 1), *params)[0]
        return h[1:].transpose(0, 1)


class _TrimmedModel(LanguageModel):
    def forward(self, x: Tensor) -> Tensor:
        """Read lines up to their ends; what follows gets any logits, or none (zeros)."""
        ends = ((x != self.padding) * torch.arange(1, x.shape[1] + 1, device=x.device)).amax(1)
        layers = [m for m in self.layers if type(m) is FastLstm and native_lstm.fits(m)]
        if int(ends.max()) and len(layers) == len(self.layers):
            return self._by_rows(x, ends, layers)
        steps = max(1, int(ends.max()))
        logits = super().forward(x[:, :steps])
        return F.pad(logits, (0, 0, 0, x.shape[1] - steps))

    def _by_rows(self, x: Tensor, ends: Tensor, layers: Sequence[FastLstm]) -> Tensor:
        """Each line for itself: no layer computes anything beyond its end."""
        order, time = ends.argsort(descending=True), torch.arange(int(ends.max())).unsqueeze(1)
        there = time < ends[order]
        lines = native_lstm.Lines(len(x), there.sum(1))
        ids = x[order, : len(time)].T[there]
        h = self.embedding(F.pad(ids, (0, -len(ids) % ROWS), value=self.padding))
        for layer in layers:
            h = layer.on_rows(h, lines)
        logits = self.out(h.unsqueeze(0))[0, : len(ids)]
        none = logits.new_zeros(x.numel(), logits.shape[1])
        at = (order * x.shape[1] + time)[there]
        return none.index_copy(0, at, logits).view(*x.shape, -1)


FASTER: dict[type[nn.Module], type[nn.Module]] = {PeepholeLstm: FastLstm, LanguageModel: _TrimmedModel}


def speed_up(model: nn.Module) -> None:
    """Turn the recurrent layers and language models in `model`, in place, into these."""
    for layer in model.modules():
        if type(layer) in FASTER:
            layer.__class__ = FASTER[type(layer)]


def speed_up_vmapped(model: nn.Module) -> None:
    """Turn the recurrent layers in `model`, in place, into ones that are fast under `torch.func.vmap`."""
    for layer in model.modules():
        if type(layer) is PeepholeLstm:
            layer.__class__ = _VmappedLstm
