"""What differential privacy says about attacks.

An attack is an event: it guesses right. Let it be right with probability at most κ when the release was made
without the record, which is the prior. Then with the record it is right with probability at most
min over ε of e^ε κ + δ(ε) (Balle, Cherubin and Hayes 2022, arXiv:2201.04845; Hayes, Mahloujifar and Balle
2023, arXiv:2302.07225, who bound the reconstruction of training data by it). With κ = 1/n it bounds telling
which of n candidates was in the data.
"""

from __future__ import annotations

from fltoolkit.accounting.events import ADD_REMOVE
from fltoolkit.accounting.losses import success_by_losses
from fltoolkit.accounting.setting import Setting, check_noise
from fltoolkit.errors import require

ANY_DELTA = 0.5
"""The bound needs no δ, a setting does."""


def success_bound(
    prior: float,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    *,
    adjacency: str = ADD_REMOVE,
    sampling: str = "poisson",
    population: int | None = None,
) -> float:
    """The largest probability in [`prior`, 1] with which any attack on `steps` Gaussian releases succeeds,
    if it would succeed with probability `prior` κ in (0, 1) without the record.

    The other arguments are those of `gaussian_epsilon`, and what it refuses is refused here. All ε count,
    so no δ has to be chosen; for plain Gaussian releases the bound is Φ(Φ⁻¹(κ) + μ), which a likelihood
    ratio test attains.
    """
    require(0 < prior < 1, "prior", "between 0 and 1", prior)
    check_noise(noise_multiplier)
    setting = Setting(sampling_rate, steps, ANY_DELTA, "pld", adjacency, sampling, population)

    def bound(s: Setting) -> float:
        return min(success_by_losses(spent, prior) for spent in s.spent(noise_multiplier))

    setting.check_adjacency("the bound", bound)
    return bound(setting)


def attained_epsilon(noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    """The ε at `delta` that samples of fixed size reach under replace-one adjacency on one pair of data sets,
    which no valid accountant can fall below: all contributions are -C but one, which is +C or -C.

    What such a sample releases has the distribution (1-q) N(0, σ²) + q N(2C, σ²) or N(0, σ²) (Lebeda et al.
    2024, arXiv:2405.20769, compare sampling schemes by this pair). `gaussian_epsilon` is larger, as an
    adversary who chooses others' contributions step by step can do better still: `docs/accounting.md`.
    """
    setting = Setting(sampling_rate, steps, delta)
    check_noise(noise_multiplier)
    return setting.epsilon(noise_multiplier / 2)
