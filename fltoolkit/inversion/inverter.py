"""A network that reads private batches off updates, and how it is trained.

Wu, Chen, Guo, Weinberger 2023, arXiv:2210.10880: a multilayer perceptron maps an update, reduced by feature
hashing, to the N inputs behind it. A batch has no order, so its loss is the least over all matchings π of
predictions with truths,

    ℓ = min_π (1/N) Σ_i ‖x̂_π(i) − x_i‖² / d,

d the number of values of an input. The network also predicts labels, by cross-entropy under the same π.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fltoolkit.inversion.generator import drawn
from fltoolkit.rng import torch_stream
from fltoolkit.types import Observation

LABEL_WEIGHT = 0.01
"""Weight of the labels' cross-entropy beside the inputs' mean squared error, in units of the input range."""

FLOOR = 1e-3
"""Features that vary less than this part of the typical one are not blown up to unit variance."""

Report = Callable[[int, float], None]
"""`report(step, loss)`: called now and then during training."""


@dataclass(frozen=True)
class Hashing:
    """Feature hashing (Weinberger et al. 2009, arXiv:0902.2206, definition 1): φ_j(v) = Σ_{h(i)=j} ξ(i) v_i.

    h sends every coordinate to one of `size` bins, ξ gives it a sign; both are drawn once, uniformly. The map
    is linear and keeps inner products in expectation. Rows no longer than `size` pass unchanged.
    """

    bins: Tensor
    signs: Tensor
    size: int

    @classmethod
    def draw(cls, length: int, size: int, rng: torch.Generator) -> Hashing:
        """A hash of rows of `length` numbers to at most `size`."""
        size = min(length, size)
        bins = torch.randint(size, (length,), generator=rng)
        signs = 2.0 * torch.randint(2, (length,), generator=rng) - 1.0
        return cls(bins, signs, size)

    def __call__(self, rows: Tensor) -> Tensor:
        """`[S, D]` -> `[S, size]`."""
        if self.size == rows.shape[1]:
            return rows.clone()
        out = rows.new_zeros(len(rows), self.size)
        return out.index_add_(1, self.bins.to(rows.device), rows * self.signs.to(rows))


def matching(guess: Tensor, truth: Tensor) -> Tensor:
    """The order `[S, N]` of each line's guesses `[S, N, d]` that pairs them with `truth [S, N, d]` at the
    least total squared error: `guess[s, order[s]]` stands beside `truth[s]`."""
    lines, count = truth.shape[:2]
    if count == 1:
        return torch.zeros(lines, 1, dtype=torch.long, device=truth.device)
    with torch.no_grad():
        cost = torch.cdist(truth.double(), guess.double()).square().cpu().numpy()
    chosen = [torch.from_numpy(linear_sum_assignment(c)[1]) for c in cost]
    return torch.stack(chosen).to(truth.device)


def matched_loss(guess: Tensor, logits: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of ℓ over S lines, and the mean cross-entropy of the labels under the same matching.

    guess, x `[S, N, d]`; logits `[S, N, classes]`; y `[S, N]`. No order of a line's examples changes it.
    """
    order = matching(guess, x)
    lines = torch.arange(len(x), device=x.device)[:, None]
    error = (guess[lines, order] - x).square().mean()
    return error, cross_entropy(logits[lines, order].flatten(0, 1), y.flatten())


class Inverter(nn.Module):
    """Features `[S, F]` -> inputs in [0, 1] `[S, N, d]` and label logits `[S, N, classes]`.

    Two hidden layers of ReLU units, a sigmoid at the inputs. mean and scale standardise the features.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, features: Tensor, hidden: int, batch: int, values: int, classes: int, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.batch = batch
        std, mean = torch.std_mean(features, 0, correction=0)
        typical = std.square().mean().sqrt().clamp_min(torch.finfo(std.dtype).tiny)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", 1 / std.clamp_min(FLOOR * typical))
        self.trunk = nn.Sequential(
            drawn(nn.Linear, rng, features.shape[1], hidden),
            nn.ReLU(),
            drawn(nn.Linear, rng, hidden, hidden),
            nn.ReLU(),
        )
        self.inputs = drawn(nn.Linear, rng, hidden, batch * values)
        self.labels = drawn(nn.Linear, rng, hidden, batch * classes)
        self.to(features.device)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.trunk((features - self.mean) * self.scale)
        x, y = self.inputs(inner).sigmoid(), self.labels(inner)
        return x.unflatten(1, (self.batch, -1)), y.unflatten(1, (self.batch, -1))


@dataclass(frozen=True)
class Training:
    """Adam at rate lr on minibatches of `batch` simulated updates, at a tenth of it for the last quarter of
    `steps`, as the paper's code has it. hidden: units of a hidden layer."""

    steps: int
    hidden: int
    lr: float
    batch: int


def train(
    features: Tensor, x: Tensor, y: Tensor, classes: int, how: Training, seed: int, report: Report
) -> tuple[Inverter, Tensor]:
    """An inverter of the updates `features [P, F]` of batches x `[P, N, ...]` in [0, 1] with labels y
    `[P, N]`; its error on each step's minibatch before the step, and on one after the last, `[steps + 1]`."""
    rng = torch_stream(seed, "minibatches")
    x = x.flatten(2)
    start = torch_stream(seed, "network")
    net = Inverter(features, how.hidden, x.shape[1], prod(x.shape[2:]), classes, start)
    optimiser = torch.optim.Adam(net.parameters(), lr=how.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [max(1, 3 * how.steps // 4)])
    trace = []
    for step in range(how.steps + 1):
        part = torch.randint(len(features), (how.batch,), generator=rng).to(features.device)
        guess, logits = net(features[part])
        error, entropy = matched_loss(guess, logits, x[part], y[part])
        trace.append(float(error.detach()))
        if step == how.steps:
            break
        optimiser.zero_grad()
        (error + LABEL_WEIGHT * entropy).backward()
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            report(step, trace[-1])
    return net.eval().requires_grad_(False), torch.tensor(trace)


def read(inverter: Inverter, features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """x `[N, d]` in [0, 1] and y `[N]` behind one update's `features [1, F]`. Known labels `[N]` are handed
    to the slots that find them likeliest, all together."""
    with torch.no_grad():
        guess, logits = inverter(features)
    if labels is None:
        return guess[0], logits[0].argmax(1)
    unlikely = -logits[0].log_softmax(1)[:, labels]
    return guess[0], labels[
        torch.from_numpy(linear_sum_assignment(unlikely.cpu().numpy())[1]).to(labels.device)
    ]


def one_round(a: Observation, b: Observation) -> bool:
    """Whether one network can serve both: they differ in nothing but the update and known labels."""
    tensors = {"model", "params", "update", "labels", "auxiliary"}
    plain = [f.name for f in fields(Observation) if f.name not in tensors]
    if any(getattr(a, name) != getattr(b, name) for name in plain):
        return False
    pairs = zip(_public(a), _public(b), strict=True)
    return all(x is y or (x.shape == y.shape and torch.equal(x, y)) for x, y in pairs)


def _public(o: Observation) -> list[Tensor]:
    """Everything but the update that a network depends on: parameters, the model's other state, data."""
    assert o.auxiliary is not None
    other = [v for k, v in o.model.state_dict().items() if k not in o.layout.names]
    return [o.params, o.auxiliary.x, o.auxiliary.y, *other]
