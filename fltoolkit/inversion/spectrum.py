"""What natural images look like to an optimiser: mostly slow waves.

The amplitude of a natural image falls about like 1/f with frequency f (Field 1987,
doi:10.1364/JOSAA.4.002379). A descent whose directions are scaled so takes the large slow parts first and
does not spend its steps on fine noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Spectrum:
    """v -> F⁻¹ (s² F v) on every channel of the images in `v [S, n]`, with s = f^-p at frequency f and 1 on
    average; what else there is in v, and inputs that are no images `[C, H, W]`, stay as they are. Of three
    channels, differences from their mean are multiplied by chroma²: natural colours vary together.

    It is symmetric and positive definite. As the first guess of an inverse Hessian it is the same as a search
    in the coordinates z of x = F⁻¹ (s F z).
    """

    def __init__(self, shape: tuple[int, ...], inputs: int, power: float, chroma: float = 1.0) -> None:
        self.shape, self.inputs, self.factor = shape, inputs, torch.ones(())
        self.chroma = chroma if shape[:1] == (3,) else 1.0
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
        if self.chroma != 1:
            smooth = torch.lerp(smooth.mean(2, keepdim=True), smooth, self.chroma**2)
        return torch.cat([smooth.flatten(1), v[:, self.inputs :]], 1)
