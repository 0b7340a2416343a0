"""Where reconstruction meets truth, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fltoolkit.metrics.image import best_trivial, match, mse, psnr, ssim
from fltoolkit.metrics.interval import mean_interval, rate_interval
from fltoolkit.metrics.label import label_accuracy
from fltoolkit.types import Examples, Reconstruction, Transcript


@dataclass(frozen=True)
class Scored:
    """One victim: its truth, the reconstruction in matching order, and the metrics of each image `[N]`.

    x `[N, C, H, W]` is clipped to the input range; psnr and gain in dB, gain over the best trivial guess
    `[N, C, H, W]`; labels accuracy in [0, 1].
    """

    truth: Examples
    x: Tensor
    y: Tensor
    psnr: Tensor
    gain: Tensor
    trivial: Tensor
    ssim: Tensor
    mse: Tensor
    labels: float
    found: Reconstruction


def score(
    found: Reconstruction,
    truth: Examples,
    mean_image: Tensor,
    input_range: tuple[float, float],
    num_classes: int,
) -> Scored:
    """Measure one reconstruction `[N]` against the private batch `[N]`."""
    low, high = input_range
    truth = truth.to("cpu")
    guess = found.x.detach().cpu().nan_to_num(low).clamp(low, high)
    order = match(guess, truth.x)
    x, y = guess[order], found.y.cpu()[order]
    values = psnr(x, truth.x, high - low)
    trivial = best_trivial(truth.x, mean_image.cpu(), input_range)
    return Scored(
        truth=truth,
        x=x,
        y=y,
        psnr=values,
        gain=values - psnr(trivial, truth.x, high - low),
        trivial=trivial,
        ssim=ssim(x, truth.x, high - low),
        mse=mse(x, truth.x),
        labels=label_accuracy(y, truth.y, num_classes),
        found=found,
    )


def truth_of(transcript: Transcript, members: Sequence[int]) -> Examples:
    """The private data behind an update that mixes these members of the cohort."""
    parts = [transcript.truth[m] for m in members]
    return Examples(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))


def summarise(scored: Sequence[Scored], threshold_db: float) -> dict[str, Any]:
    """The `metrics` of a report: each value is one victim's mean over its images."""

    def estimate(name: str) -> dict[str, Any]:
        return mean_interval([float(torch.as_tensor(getattr(s, name)).double().mean()) for s in scored])

    successes = sum(bool(s.psnr.max() > threshold_db) for s in scored)
    return {
        "psnr_db": estimate("psnr"),
        "psnr_gain_db": estimate("gain"),
        "ssim": estimate("ssim"),
        "mse": estimate("mse"),
        "label_accuracy": estimate("labels"),
        "success_rate": rate_interval(successes, len(scored)) | {"threshold_db": threshold_db},
    }
