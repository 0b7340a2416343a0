"""What natural images look like to an optimiser: mostly slow waves of light and dark.

The amplitude of a natural image falls about like 1/f with frequency f (Field 1987,
doi:10.1364/JOSAA.4.002379). Its colours vary along three axes, most in luminance, less from warm to cool,
least from green to magenta (Ruderman, Cronin, Chiao 1998, doi:10.1364/JOSAA.15.002036). A descent whose
directions are scaled so takes the large slow parts first and does not spend its steps on noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPPONENT = torch.nn.functional.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]), dim=1)
"""Rows: luminance, warm to cool, magenta to green, of red, green and blue; an orthogonal matrix."""

GREEN = 1 / 3
"""How much less natural images vary from green to magenta than from warm to cool, roughly."""


class Spectrum:
    """v -> F⁻¹ (s² F v) on every channel of the images in `v [S, n]`, with s = f^-p at frequency f and 1 on
    average; what else there is in v, and inputs that are no images `[C, H, W]`, stay as they are. Of three
    channels, the difference of warm and cool is multiplied by chroma², that of green and magenta by
    (GREEN chroma)²; 1 for chroma leaves both.

    It is symmetric and positive definite. As the first guess of an inverse Hessian it is the same as a search
    in the coordinates z of x = F⁻¹ (s F z).
    """

    def __init__(self, shape: tuple[int, ...], inputs: int, power: float, chroma: float = 1.0) -> None:
        self.shape, self.inputs, self.factor = shape, inputs, torch.ones(())
        self.colours: Tensor | None = None
        if len(shape) == 3 and shape[0] == 3 and chroma != 1:
            scales = torch.tensor([1.0, chroma, GREEN * chroma])
            self.colours = OPPONENT.T * scales.square() @ OPPONENT
        if len(shape) == 3:
            height, width = shape[1:]
            down, right = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
            frequency = torch.hypot(down, right).clamp_min(1 / max(height, width))
            scale = frequency**-power
            self.factor = (scale / scale.mean()).square()

    def __call__(self, v: Tensor) -> Tensor:
        if len(self.shape) != 3:
            return v
        images = v[:, : self.inputs].reshape(len(v), -1, *self.shape)
        waves = torch.fft.rfft2(images) * self.factor.to(v.device)
        smooth = torch.fft.irfft2(waves, s=self.shape[1:])
        if self.colours is not None:
            smooth = torch.einsum("ij,snjhw->snihw", self.colours.to(v), smooth)
        return torch.cat([smooth.flatten(1), v[:, self.inputs :]], 1)
