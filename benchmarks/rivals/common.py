"""What all rivals share: the task, its start, and how their result is judged."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit import data, models
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.report import document
from fltoolkit.rng import stream, torch_stream
from fltoolkit.types import Layout
from rivals import Client

TASKS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "2nn": ("2nn", (1, 28, 28), 10),
    "cnn": ("cnn", (1, 28, 28), 10),
    "lstm": ("charlstm", (80,), 258),
}
"""Task -> model of fltoolkit, shape of an input, classes. The LSTM reads lines of 80 characters."""
EXAMPLES = {"2nn": 600, "cnn": 600, "lstm": 74}
"""Task -> examples a client: MNIST's share at K = 100; the lines of a role in the paper's Shakespeare."""


def start(task: str) -> nn.Module:
    """The model of `task` as every rival starts it."""
    return models.build(*TASKS[task], torch_stream(0, "benchmark", "start", task))


def row_of(model: nn.Module) -> np.ndarray:
    return Layout.of(model).row(model).numpy()


@torch.no_grad()
def put_row(model: nn.Module, row: np.ndarray) -> None:
    """Copy `row [D]` into the parameters of `model`."""
    parts = Layout.of(model).unflatten(torch.from_numpy(np.array(row, np.float32)))
    for name, parameter in model.named_parameters():
        parameter.copy_(parts[name])


def tensors(client: Client) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(client[0]), torch.from_numpy(client[1])


@torch.no_grad()
def training_loss(task: str, row: np.ndarray, clients: list[Client], most: int = 5000) -> float:
    """Mean cross-entropy of the parameters `row` over the clients' first examples, `most` in all."""
    model = start(task).eval()
    put_row(model, row)
    each = -(-most // len(clients))
    x = torch.from_numpy(np.concatenate([x[:each] for x, _ in clients]))
    y = torch.from_numpy(np.concatenate([y[:each] for _, y in clients]))
    total = sum(
        float(cross_entropy(model(a), b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return total / len(x)


def same_work(before: float, after: float, reference: float, tolerance: float = 0.2) -> bool:
    """Whether the loss fell from `before` to `after` as far as to `reference`, within a share of the fall.

    In one round of the 2NN with ten clients of 600 random images, the order of the examples moves the fall
    by 3 % (standard deviation, 8 orders); half the examples give a quarter of it. With three clients the
    order moves it by 9 %, too much for this tolerance.
    """
    return abs(after - reference) <= tolerance * (before - reference)


def random_clients(task: str, count: int, size: int, seed: int) -> list[Client]:
    """`count` clients with `size` examples each, of random inputs that a model can learn: images are noise
    around one prototype a class, characters mostly follow from the one before."""
    rng = stream(seed, "benchmark", "data", task)
    return [(_random_lines if task == "lstm" else _random_images)(task, size, rng) for _ in range(count)]


def _random_images(task: str, size: int, rng: np.random.Generator) -> Client:
    _, shape, classes = TASKS[task]
    prototypes = stream(0, "benchmark", "prototypes", task).random((classes, *shape), np.float32)
    y = rng.integers(0, classes, size)
    return (prototypes[y] + rng.random((size, *shape), np.float32)) / 2, y


def _random_lines(task: str, size: int, rng: np.random.Generator) -> Client:
    """The next of 90 characters follows from the one before, one time in five anything does."""
    (steps,) = TASKS[task][1]
    text = rng.integers(0, 90, (size, steps + 1))
    for t in range(steps):
        follows = rng.random(size) < 0.8
        text[follows, t + 1] = (5 * text[follows, t] + 7) % 90
    return text[:, :-1].copy(), text[:, 1:].copy()


def deal(task: str, count: int, size: int, seed: int) -> tuple[list[Client], str]:
    """`count` clients with `size` examples each, and where those come from: MNIST dealt at random where it is
    found and `task` reads images, else random numbers."""
    if task != "lstm":
        try:
            train = data.load("mnist").train
        except InputError as e:
            print(f"random images, since MNIST cannot be had: {e}")
        else:
            order = stream(seed, "benchmark", "partition").permutation(len(train))
            x, y = train.x.numpy(), train.y.numpy()
            parts = order[: count * size].reshape(count, size)
            return [(x[p], y[p]) for p in parts], "mnist, dealt at random"
    return random_clients(task, count, size, seed), "random"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed versions of Python and of `packages`."""
    found = {"python": document.versions()["python"]}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
