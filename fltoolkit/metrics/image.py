"""How close reconstructed images are to the true ones."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PSNR_CEILING_DB = 100.0
"""PSNR is reported up to here, so that an exact reconstruction has a finite mean."""


def mse(x: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each image: `[N, C, H, W]` twice -> `[N]`, in squared units of the data."""
    return (x.double() - truth.double()).square().flatten(1).mean(1)


def psnr(x: Tensor, truth: Tensor, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(data_range² / MSE) of each image, `[N]` in dB, at most 100."""
    floor = data_range**2 * 10 ** (-PSNR_CEILING_DB / 10)
    return 10 * torch.log10(data_range**2 / mse(x, truth).clamp_min(floor))


def ssim(x: Tensor, truth: Tensor, data_range: float) -> Tensor:
    """Structural similarity of each image, `[N]` in [-1, 1], by scikit-image.

    Wang et al. 2004, doi:10.1109/TIP.2003.819861: Gaussian window with σ = 1.5; images with a side below
    11 pixels get the largest uniform window that fits, at most 7.
    """
    from skimage.metrics import structural_similarity

    side = min(x.shape[-2:])
    if side >= 11:
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    else:
        window = {"win_size": min(7, side - 1 + side % 2)}
    values = [
        structural_similarity(b, a, data_range=data_range, channel_axis=0, **window)
        for a, b in zip(x.double().cpu().numpy(), truth.double().cpu().numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def match(x: Tensor, truth: Tensor) -> Tensor:
    """The order `[N]` of the reconstructions `x [N, ...]` that pairs them with `truth [N, ...]` at least
    total squared error: `x[order]` stands beside `truth` (the assignment problem, scipy)."""
    cost = torch.cdist(x.double().flatten(1), truth.double().flatten(1)).square()
    chosen, partner = linear_sum_assignment(cost.cpu().numpy())
    order = torch.empty(len(truth), dtype=torch.long)
    order[torch.as_tensor(partner)] = torch.as_tensor(chosen)
    return order


def best_trivial(truth: Tensor, mean_image: Tensor, input_range: tuple[float, float]) -> Tensor:
    """The better of two guesses that need no update, image by image `[N, C, H, W]`: the middle grey, and the
    mean image `[C, H, W]` of the data set."""
    low, high = input_range
    guesses = torch.stack([torch.full_like(truth, (low + high) / 2), mean_image.to(truth).expand_as(truth)])
    best = torch.stack([mse(g, truth) for g in guesses]).argmin(0)
    return guesses[best, torch.arange(len(truth))]
