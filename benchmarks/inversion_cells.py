"""The grid of the inversion benchmark: which cells there are, what each costs, and the models they attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fltoolkit import models, registry
from fltoolkit.attack import Attack
from fltoolkit.data import Dataset, load
from fltoolkit.loss import cross_entropy
from fltoolkit.models import evaluating
from fltoolkit.report.files import write_atomic
from fltoolkit.rng import torch_stream
from fltoolkit.specs import parse
from fltoolkit.types import Examples, LocalSpec

BATCHES = (1, 4, 8, 16)
WEIGHTS = ("untrained", "trained")
LOCALS = {"1step": "1 step", "5steps": "5 steps", "epoch": "epoch of 4 steps"}
RATE = 0.1
"""η of the private clients."""
HELD_OUT = 10_000
"""The last training images belong to the victims; no model is trained on them."""
TESTED = 2000
LBFGS_ATTACKS = ("idlg", "dlg")
"""They take an update for one gradient unless told to simulate; cells of several local steps leave out those
that are not told."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Target:
    """A model and how it is treated.

    data: its images. iterations: most of a search, by attack; other attacks get the first; several local
    steps, which are simulated, get half. ms: of an iteration on one victim, roughly, on one core. steps, lr:
    SGD with momentum that makes the trained one. restarts: of L-BFGS attacks, None for their own. images:
    fewest a cell. batches, locals: its part of the grid.
    """

    data: str
    iterations: dict[str, int]
    ms: float
    steps: int
    lr: float
    restarts: int | None = None
    images: int = 30
    batches: tuple[int, ...] = BATCHES
    locals: tuple[str, ...] = tuple(LOCALS)


LARGE: dict[str, Any] = {"images": 6, "batches": (1, 4), "locals": ("1step",)}
TARGETS: dict[str, Target] = {
    "2nn": Target("mnist", {"inverting": 1000, "idlg": 1000}, 1.5, 300, 0.05),
    "lenet": Target("cifar10", {"inverting": 1500, "idlg": 1500, "natural": 1500}, 2.0, 1000, 0.05),
    "cnn": Target("mnist", {"inverting": 300, "idlg": 150, "natural": 300}, 20.0, 200, 0.02, restarts=2),
    "convnet": Target("cifar10", {"inverting": 400}, 200.0, 200, 0.02, **LARGE),
    "resnet18": Target("cifar10", {"inverting": 300}, 500.0, 150, 0.02, **LARGE),
}
ATTACKS = ("idlg", "inverting", "natural")


@dataclass(frozen=True)
class Cell:
    """One setting and one attack on it. local: a key of LOCALS."""

    model: str
    weights: str
    batch: int
    local: str
    attack: str

    @property
    def id(self) -> str:
        attack = "".join(c if c.isalnum() else "-" for c in self.attack)
        return f"{self.model}-{self.weights}-n{self.batch}-{self.local}-{attack}"

    @property
    def target(self) -> Target:
        return TARGETS[self.model]

    @property
    def recipe(self) -> LocalSpec:
        """What the client does: one step on everything, five of those, or an epoch in quarters."""
        return {
            "1step": LocalSpec(1, None, RATE),
            "5steps": LocalSpec(5, None, RATE),
            "epoch": LocalSpec(1, max(1, self.batch // 4), RATE),
        }[self.local]

    @property
    def victims(self) -> int:
        """Enough for the images that the model asks for, and for an interval."""
        return max(4, ceil(self.target.images / self.batch))

    @property
    def budget(self) -> int:
        """Most iterations of a search."""
        by_attack = self.target.iterations
        most = by_attack.get(self.attack.partition(":")[0], next(iter(by_attack.values())))
        return most if self.local == "1step" else most // 2

    def make(self, iterations: int | None) -> Attack:
        """The attack with `iterations`, or with its own options where those say, or with the budget."""
        name, options = parse(self.attack)
        steps = iterations or (None if "steps" in options else self.budget)
        restarts = self.target.restarts if name in LBFGS_ATTACKS and "restarts" not in options else None
        return registry.make_attack(self.attack, steps=steps, restarts=restarts)

    @property
    def cost(self) -> float:
        """Seconds by rough estimate, which decide the order of cells."""
        each = self.target.ms * (1 + 0.1 * self.batch) * self.recipe.steps(self.batch)
        name = self.attack.partition(":")[0]
        searches = 3 if name in LBFGS_ATTACKS else 8 if (name, self.local) == ("natural", "epoch") else 1
        return self.victims * self.budget * searches * each / 1000

    def setting(self) -> dict[str, Any]:
        local = asdict(self.recipe) | {"steps": self.recipe.steps(self.batch)}
        return {"id": self.id, **asdict(self), "local": self.local, "recipe": local}


def cells(attacks: tuple[str, ...] = ATTACKS) -> list[Cell]:
    """All cells, the cheap ones first."""
    return sorted(_cells(attacks), key=lambda c: (c.cost, c.id))


def _cells(attacks: tuple[str, ...]) -> Iterator[Cell]:
    for model, target in TARGETS.items():
        for weights in WEIGHTS:
            for batch in target.batches:
                for local in target.locals:
                    if local == "epoch" and batch < 4:
                        continue
                    for attack in attacks:
                        cell = Cell(model, weights, batch, local, attack)
                        if _suits(cell, attacks):
                            yield cell


def _suits(cell: Cell, attacks: tuple[str, ...]) -> bool:
    """Whether the attack can work there; of the default ones, a model gets those with a budget."""
    name = cell.attack.partition(":")[0]
    if name in LBFGS_ATTACKS and cell.local != "1step":
        return bool(getattr(registry.make_attack(cell.attack), "simulate", False))
    return attacks != ATTACKS or name in cell.target.iterations


@cache
def dataset(name: str) -> tuple[Dataset, Examples]:
    """The data with the victims' part as its training split, and the part that models are trained on."""
    data = load(name)
    held = min(HELD_OUT, len(data.train) // 4)
    split = len(data.train) - held
    return replace(data, train=data.train.take(slice(split, None))), data.train.take(slice(split))


def trained(
    model: str, name: str, seed: int, folder: Path, progress: Progress, device: str = "cpu"
) -> tuple[nn.Module, float]:
    """`model` after its training on data `name`, and its accuracy on test images; kept in `folder`. A model
    that is not in TARGETS is trained as the ConvNet is."""
    target, (data, examples) = TARGETS.get(model, TARGETS["convnet"]), dataset(name)
    start = torch_stream(seed, "inversion", model, "start")
    net = models.build(model, data.input_shape, data.num_classes, start)
    path = folder / f"{model}-{name}-{target.steps}-{target.lr}-{seed}-{torch.device(device).type}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
    else:
        train(net.to(device), examples, target, torch_stream(seed, "inversion", model, "batches"), progress)
        kept = {"accuracy": accuracy(net, data.test), "state": net.cpu().state_dict()}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda p: torch.save(kept, p))
    net.load_state_dict(kept["state"])
    return net, float(kept["accuracy"])


def train(
    net: nn.Module, data: Examples, target: Target, rng: torch.Generator, progress: Progress, size: int = 64
) -> None:
    """SGD with momentum 0.9 on minibatches drawn with `rng`; BatchNorm learns its statistics."""
    optimiser = torch.optim.SGD(net.parameters(), lr=target.lr, momentum=0.9)
    net.train()
    device = next(net.parameters()).device
    for step in range(target.steps):
        batch = data.take(torch.randint(len(data), (size,), generator=rng)).to(device)
        loss = cross_entropy(net(batch.x), batch.y).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        progress(step + 1, target.steps, f"training, loss {float(loss.detach()):.3f}")


@torch.no_grad()
def accuracy(net: nn.Module, test: Examples | None) -> float:
    """The share of the first test images that the model gets right."""
    if test is None:
        return float("nan")
    device = next(net.parameters()).device
    with evaluating(net):
        guesses: list[Tensor] = [net(x.to(device)).argmax(1).cpu() for x in test.x[:TESTED].split(250)]
    return float((torch.cat(guesses) == test.y[:TESTED]).float().mean())
