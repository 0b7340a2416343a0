"""What an engine is, and the order in which it visits a client's examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit.types import Examples, Layout, LocalSpec, Loss


class Engine:
    """Trains a cohort from one broadcast. Built once a run for a model and a loss; what it keeps
    between calls changes no number."""

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss, self.layout = model, loss, Layout.of(model)

    @classmethod
    def refuses(cls, model: nn.Module, loss: Loss, input_shape: tuple[int, ...]) -> str | None:
        """Why this engine cannot train `model` on inputs of this shape under `loss`; None where it can."""
        return None

    def __call__(
        self,
        params: Tensor,
        data: Sequence[Examples],
        local: LocalSpec,
        rngs: Sequence[np.random.Generator],
    ) -> Tensor:
        """w_k − w_t of every client, `[K, D]`, from the broadcast `params [D]`.

        Client k splits its data into batches of size B in the order that `visiting` draws from `rngs[k]`,
        once, and steps through them E times: w ← w − η v, with v ← μ v + ∇ℓ(w; b) + λ w.
        """
        raise NotImplementedError


def visiting(count: int, local: LocalSpec, rng: np.random.Generator) -> Tensor:
    """The order in which a client visits its `count` examples, `[count]`: drawn from all of them, or from a
    shuffle buffer, as input pipelines have it: its first examples fill it, one of them is drawn at random,
    and the next example takes that one's place."""
    size = count if local.buffer is None else min(local.buffer, count)
    if size == count:
        return torch.from_numpy(rng.permutation(count))
    places = rng.integers(size, size=count - size)
    found, left = np.empty(count - size, dtype=np.int64), np.arange(size)
    by_place = np.argsort(places, kind="stable")
    first = np.diff(places[by_place], prepend=-1) > 0
    found[by_place] = np.where(first, places[by_place], size + np.roll(by_place, 1))
    left[places] = size + np.arange(count - size)
    return torch.from_numpy(np.concatenate([found, rng.permutation(left)]))


def in_visiting_order(data: Examples, local: LocalSpec, rng: np.random.Generator) -> Examples:
    order = visiting(len(data), local, rng).to(data.x.device)
    return Examples(data.x[order], data.y[order])


def most_first(data: Sequence[Examples]) -> list[int]:
    """Positions of the clients by falling number of examples."""
    return sorted(range(len(data)), key=lambda k: -len(data[k]))


def in_callers_order(rows: Tensor, order: Sequence[int]) -> Tensor:
    """Undo `order`: row i belongs to position `order[i]`."""
    if list(order) == sorted(order):
        return rows
    return rows[torch.tensor(order, device=rows.device).argsort()]


_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.AlphaDropout, nn.RReLU, nn.FractionalMaxPool2d)


def draws(model: nn.Module) -> bool:
    """Whether a forward pass in training mode may draw random numbers: layers of PyTorch that do, and
    modules that say so by an attribute `draws`."""
    return any(_may_draw(m) for m in model.modules() if m.training)


def without_draws(model: nn.Module) -> nn.Module:
    """`model`, or where it draws a copy whose drawing layers are in evaluation mode: what an adversary can
    compute who does not know what a client drew."""
    if not draws(model):
        return model
    model = deepcopy(model)
    for layer in [m for m in model.modules() if _may_draw(m)]:
        layer.eval()
    return model


def _may_draw(layer: nn.Module) -> bool:
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention) and layer.dropout > 0:
        return True
    return isinstance(layer, _RANDOM_LAYERS) or bool(getattr(layer, "draws", False))


def each_on_its_core(work: Callable[[int], None], items: Sequence[int], threads: int) -> None:
    """`work(item)` for every item, on as many threads, none of which splits its operations further.

    The calling thread works too: another may wait for its core, on which PyTorch's own idle threads spin for
    some milliseconds after their last operation.
    """
    waiting = iter(items)

    def serve() -> None:
        torch.set_num_threads(1)
        for item in waiting:
            work(item)

    helpers, cores = min(threads, len(items)) - 1, torch.get_num_threads()
    if helpers < 1:
        for item in waiting:
            work(item)
        return
    try:
        with ThreadPoolExecutor(helpers) as pool:
            others = [pool.submit(serve) for _ in range(helpers)]
            serve()
            for other in others:
                other.result()
    finally:
        torch.set_num_threads(cores)


@dataclass(frozen=True)
class Stacked:
    """Clients side by side, those with most steps first, so that at any time the active are a prefix.

    x `[K, n, ...]`, y `[K, n, ...]` in visiting order, filled up with zeros to n = max n_k; sizes `[K]`.
    """

    x: Tensor
    y: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, data: Sequence[Examples], local: LocalSpec, rngs: Sequence[np.random.Generator]) -> Stacked:
        """From clients that `most_first` has ordered."""
        sizes = torch.tensor([len(d) for d in data])
        x, y = (t.new_zeros(len(data), int(sizes[0]), *t.shape[1:]) for t in (data[0].x, data[0].y))
        for k, (d, rng) in enumerate(zip(data, rngs, strict=True)):
            if d.x.shape[1:] != x.shape[2:] or d.y.shape[1:] != y.shape[2:]:
                raise ValueError(f"inputs of shape {tuple(d.x.shape[1:])} beside {tuple(x.shape[2:])}")
            order = visiting(len(d), local, rng).to(x.device)
            torch.index_select(d.x, 0, order, out=x[k, : len(d)])
            torch.index_select(d.y, 0, order, out=y[k, : len(d)])
        return cls(x, y, sizes)

    def epoch(self, batch: int | None) -> list[tuple[slice, Tensor]]:
        """The batches of an epoch: the slice of every client's examples, and how many of the slice each
        active client has, `[active]` (all at least 1)."""
        largest = int(self.sizes[0])
        width = largest if batch is None else min(batch, largest)
        held = [(slice(a, a + width), (self.sizes - a).clamp(0, width)) for a in range(0, largest, width)]
        return [(s, h[h > 0].to(self.x.device)) for s, h in held]
