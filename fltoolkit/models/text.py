"""Language models of McMahan et al. 2017, arXiv:1602.05629, section 3.

The paper prints parameter counts only. Both are met exactly, 866,578 and 4,950,544, by LSTM layers with
peephole connections (Gers, Schraudolph, Schmidhuber 2002, JMLR 3) and one bias a gate; of characters there
are then 258: 256 bytes, a start and a padding symbol.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fltoolkit.errors import InputError

BYTES = 256
START, PADDING = BYTES, BYTES + 1
CHARACTERS = BYTES + 2


class PeepholeLstm(nn.Module):
    """One LSTM layer whose gates see the cell: from x `[B, T, inputs]` to hidden states `[B, T, units]`.

    With z = W x_t + U h_{t-1} + b in the order o, i, f, g and peepholes p in the order o, i, f:

        i = σ(z_i + p_i c_{t-1})    f = σ(z_f + p_f c_{t-1})    c_t = f c_{t-1} + i tanh(z_g)
        o = σ(z_o + p_o c_t)        h_t = o tanh(c_t)           h_0 = c_0 = 0
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.units = units
        self.input_weight = nn.Parameter(torch.empty(4 * units, inputs))
        self.hidden_weight = nn.Parameter(torch.empty(4 * units, units))
        self.bias = nn.Parameter(torch.empty(4 * units))
        self.peephole = nn.Parameter(torch.empty(3 * units))

    @torch.no_grad()
    def reset(self, rng: torch.Generator) -> None:
        """Uniform within ± 1 / sqrt(units), as torch.nn.LSTM; the forget gates' bias 1, so cells keep."""
        bound = 1 / sqrt(self.units)
        for p in self.parameters():
            p.uniform_(-bound, bound, generator=rng)
        self.bias[2 * self.units : 3 * self.units] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        p_o, p_i, p_f = self.peephole.chunk(3)
        h = c = x.new_zeros(len(x), self.units)
        states = []
        for from_input in F.linear(x, self.input_weight, self.bias).unbind(1):
            z_o, z_i, z_f, z_g = (from_input + F.linear(h, self.hidden_weight)).chunk(4, -1)
            i, f = torch.sigmoid(z_i + p_i * c), torch.sigmoid(z_f + p_f * c)
            c = f * c + i * torch.tanh(z_g)
            h = torch.sigmoid(z_o + p_o * c) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, 1)


class LanguageModel(nn.Module):
    """The next token after each one: from ids `[B, T]` to logits `[B, T, tokens]`.

    padding: the id that fills up short lines, at their end only; what follows it counts for nothing.
    """

    def __init__(self, tokens: int, width: int, units: int, layers: int) -> None:
        super().__init__()
        self.padding = tokens - 1
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.Sequential(*(PeepholeLstm(units if k else width, units) for k in range(layers)))
        self.out = nn.Linear(units, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(self.embedding(x)))


def charlstm(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Characters embedded in 8 dimensions, two layers of 256 units; 866,578 parameters at 258 characters."""
    _line("charlstm", shape)
    return LanguageModel(classes, 8, 256, 2)


def wordlstm(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Words embedded in 192 dimensions, one layer of 256 units; 4,950,544 parameters with 10,000 words."""
    _line("wordlstm", shape)
    return LanguageModel(classes, 192, 256, 1)


def _line(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise InputError(f"model {name!r} must get lines of token ids [T], got inputs {shape}")
