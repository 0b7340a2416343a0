"""Metrics against scikit-image, torchmetrics, brute force and closed forms."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import structural_similarity_index_measure

from fltoolkit.metrics.image import best_trivial, match, mse, psnr, ssim
from fltoolkit.metrics.interval import mean_interval, rate_interval
from fltoolkit.metrics.label import label_accuracy


def pair(shape=(4, 3, 32, 32), noise=0.1):
    truth = torch.rand(shape)
    return (truth + noise * torch.randn(shape)).clamp(0, 1), truth


@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_psnr_agrees_with_scikit_image(data_range):
    x, truth = pair()
    for value, a, b in zip(psnr(x, truth, data_range), x, truth, strict=True):
        expected = peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=data_range)
        assert value.item() == pytest.approx(expected, abs=1e-4)


def test_psnr_of_an_exact_copy_is_the_stated_ceiling():
    _, truth = pair()
    assert psnr(truth, truth, 1.0).tolist() == [100.0] * 4
    assert psnr(truth, truth, 255.0).tolist() == pytest.approx([100.0] * 4)


def test_mse_is_per_image():
    truth = torch.zeros(2, 1, 2, 2)
    x = truth.clone()
    x[1, 0, 0, 0] = 2.0
    assert mse(x, truth).tolist() == [0.0, 1.0]


def test_ssim_agrees_with_torchmetrics():
    """torchmetrics pads by reflection where scikit-image crops, hence the tolerance."""
    x, truth = pair(noise=0.2)
    expected = structural_similarity_index_measure(x, truth, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(x, truth, 1.0), expected.double(), atol=0.01, rtol=0)
    assert ssim(truth, truth, 1.0).tolist() == pytest.approx([1.0] * 4)


def test_ssim_of_small_images_is_defined():
    x, truth = pair((2, 1, 8, 8))
    values = ssim(x, truth, 1.0)
    assert (values < 0.99).all()
    assert (values > 0).all()


def test_matching_is_the_best_permutation():
    truth = torch.rand(4, 1, 3, 3)
    x = truth[[2, 0, 3, 1]] + 0.3 * torch.randn(4, 1, 3, 3)
    best = min(permutations(range(4)), key=lambda p: (x[list(p)] - truth).square().sum().item())
    assert match(x, truth).tolist() == list(best)


def test_best_trivial_guess_by_hand():
    truth = torch.stack([torch.full((1, 2, 2), 0.6), torch.full((1, 2, 2), 0.9)])
    mean = torch.full((1, 2, 2), 0.8)
    values = psnr(best_trivial(truth, mean, (0.0, 1.0)), truth, 1.0)
    assert values.tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_labels_are_compared_as_multisets():
    y = torch.tensor([3, 3, 1])
    assert label_accuracy(torch.tensor([1, 3, 3]), y, 5) == 1.0
    assert label_accuracy(torch.tensor([1, 1, 3]), y, 5) == pytest.approx(2 / 3)
    assert label_accuracy(torch.tensor([0, 2, 4]), y, 5) == 0.0


def test_mean_interval_agrees_with_scipy_and_is_absent_for_one_value():
    values = [1.0, 2.0, 4.0, 7.0]
    ci = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values)["ci95"] == pytest.approx([ci.low, ci.high])
    assert mean_interval([2.0]) == {"mean": 2.0, "ci95": None, "values": [2.0]}


def test_rate_interval_is_clopper_pearson():
    """Closed form through the beta distribution."""
    got = rate_interval(7, 10)
    assert got["value"] == 0.7
    assert got["ci95"] == pytest.approx([stats.beta.ppf(0.025, 7, 4), stats.beta.ppf(0.975, 8, 3)])
    assert rate_interval(10, 10)["ci95"] == pytest.approx([0.025 ** (1 / 10), 1.0])


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    mean_hits = rate_hits = 0
    for _ in range(400):
        low, high = mean_interval(rng.normal(3.0, 2.0, 8))["ci95"]
        mean_hits += low <= 3.0 <= high
        low, high = rate_interval(int(rng.binomial(20, 0.7)), 20)["ci95"]
        rate_hits += low <= 0.7 <= high
    assert 0.92 < mean_hits / 400 < 0.98
    assert rate_hits / 400 >= 0.93
