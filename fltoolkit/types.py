"""The values that flow through the pipeline. All are frozen: a function takes values, returns new ones.

The central convention: *an update is a row*. What a cohort of K clients sends is one float matrix
`[K, D]`, D the number of model parameters, and a `Layout` knows which columns are which parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fltoolkit.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits [N, classes], y) -> [N]`, unreduced; y: classes `[N]` or distributions `[N, classes]`."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a model's trainable parameters in the order of the columns of a row."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of `model`'s trainable parameters; raises InputError where it has none."""
        named = [(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise InputError(f"model {type(model).__name__} has no trainable parameters")
        return cls(tuple(n for n, _ in named), tuple(s for _, s in named))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(prod(s) for s in self.shapes)

    @property
    def size(self) -> int:
        """D, the length of a row."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """`{name: [..., *shape]}` -> `[..., D]`; leading dimensions are kept."""
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            t = tensors[name]
            parts.append(t.reshape(*t.shape[: t.dim() - len(shape)], prod(shape)))
        return torch.cat(parts, dim=-1)

    def unflatten(self, rows: Tensor) -> dict[str, Tensor]:
        """`[..., D]` -> `{name: [..., *shape]}`, as `torch.func.functional_call` takes it. Views only."""
        pieces = rows.split(self.sizes, dim=-1)
        return {
            n: p.unflatten(-1, s) if s else p.squeeze(-1)
            for n, p, s in zip(self.names, pieces, self.shapes, strict=True)
        }

    def row(self, model: nn.Module) -> Tensor:
        """A copy of `model`'s parameters as a row `[D]`."""
        return self.flatten({n: p.detach() for n, p in model.named_parameters()}).clone()

    def first_non_finite(self, row: Tensor) -> str | None:
        """The name of the first parameter with a NaN or infinity in `row [D]`, or None."""
        for name, part in self.unflatten(row).items():
            if not torch.isfinite(part).all():
                return name
        return None


@dataclass(frozen=True)
class Examples:
    """Inputs `x [N, ...]` with labels `y [N]`."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Any) -> Examples:
        """The examples at `index` (indices, slice or mask), as a copy."""
        return Examples(self.x[index].clone(), self.y[index].clone())

    def to(self, device: str | torch.device) -> Examples:
        return Examples(self.x.to(device), self.y.to(device))


PRECISIONS = ("float32", "bf16")
"""Of a network's own arithmetic: float32, or products of numbers in bfloat16 where that is faster."""


@dataclass(frozen=True)
class LocalSpec:
    """What each client does with the broadcast model (McMahan et al. 2017, Algorithm 1, ClientUpdate).

    epochs: E, passes over the client's data. batch: B, examples a step; None stands for the paper's
    infinity, the whole local data set as one batch. lr: the step size η. momentum: μ in v ← μ v + g, from
    v = 0 in each round. weight_decay: λ, g being ∇ℓ(w; b) + λ w. buffer: examples that lie in the shuffle
    buffer from which batches are drawn, at least 1; None for all of a client's, which mixes them fully.
    precision: one of PRECISIONS.
    """

    epochs: int = 1
    batch: int | None = None
    lr: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    buffer: int | None = None
    precision: str = "float32"

    def steps(self, num_examples: int) -> int:
        """Local steps u of a client that holds `num_examples`."""
        size = num_examples if self.batch is None else min(self.batch, num_examples)
        return self.epochs * -(-num_examples // size)


@dataclass(frozen=True)
class Updates:
    """What a cohort computed, before any defense: `delta [K, D]` is w_k - w_t, one row a client."""

    delta: Tensor
    clients: tuple[int, ...]
    num_examples: Tensor
    layout: Layout
    round: int


UPDATE = "update"
"""The name of what every round releases, whatever else it does."""


@dataclass(frozen=True)
class PrivacyEvent:
    """One use of a mechanism, as data; only `fltoolkit.accounting` turns it into ε.

    event: a `dp_accounting.DpEvent`, whose noise multiplier is always the noise's std divided by the clip
    norm of one contribution. view: what it protects: "message" (each client's message), "sum" (the
    messages' sum before the server touches it) or "aggregate" (what the server releases). unit: what ε
    hides, "client" or "example". release: events of one round about the same release are alternative
    guarantees, of which the better counts; events about different releases compose, and a round without one
    about the update has no guarantee. adjacency: what neighbouring data sets differ in: one contribution put
    to zero ("zero-out"), one more or less ("add-remove"), or one replaced by any other ("replace-one").
    owner: with unit "example", the client whose examples are protected; every client that takes part in a
    round needs an event of its own there. count: how often in that round, such as once a local step.
    """

    event: Any
    view: str
    unit: str = "client"
    release: str = UPDATE
    adjacency: str = "zero-out"
    owner: int | None = None
    count: int = 1


@dataclass(frozen=True)
class Meddling:
    """How a malicious server departs from the protocol in a round. broadcasts: parameters `[D]` that some
    clients receive in the place of the model, by client. ignored: clients whose masked inputs it says it
    never got."""

    broadcasts: Mapping[int, Tensor] = field(default_factory=dict)
    ignored: frozenset[int] = frozenset()


HONEST = Meddling()


@dataclass(frozen=True)
class Transcript:
    """One round as it happened. `truth` is read by the metrics alone; threat models never touch it.

    broadcast `[D]`; messages `[K, ...]` as sent (floats, or masked integers where `messages_hidden`); total
    `[D]`, their weighted mean as the server receives it, both with public changes of coordinates undone,
    as anybody could; aggregate `[D]`, the
    same after the server's defenses, as released; weights `[K]`, the averaging weights; local: the
    recipe of this round.
    """

    broadcast: Tensor
    messages: Tensor
    messages_hidden: bool
    total: Tensor
    aggregate: Tensor
    weights: Tensor
    updates: Updates
    local: LocalSpec
    truth: tuple[Examples, ...]
    events: tuple[PrivacyEvent, ...]


@dataclass(frozen=True)
class History:
    """The sums of several rounds over one model. sums `[T, D + 1]`: Σ n_k Δ_k and, last, Σ n_k over each
    round's survivors. participants `[T, N]` (bool): who of the N clients was in which sum, None where that
    is hidden; windows, counts `[W, N]`: groups of rounds, and in how many of them each client was. target:
    the client that the adversary is after."""

    sums: Tensor
    participants: Tensor | None
    windows: tuple[tuple[int, ...], ...]
    counts: Tensor
    target: int


@dataclass(frozen=True)
class Observation:
    """Everything the adversary holds, and nothing else.

    model, loss: the public architecture and loss; `params [D]` the broadcast it evaluated at.
    update `[D]`: the difference w_k - w_t it saw, a weighted mean over `clients` clients and over
    `num_examples` examples in all. local: E, B, η if known, else None. labels `[num_examples]` if
    known, else None. input_shape, input_range: shape and bounds of one input. defenses: the public
    parameters of each defense in order (Kerckhoffs). auxiliary: public data, never the private set. history:
    sums of several rounds, where the adversary watched that long. buffers: of the client's model after local
    training, by name, where it sent them along. released: whether the update went through
    what defenses do at the server too; else it is a message, or a mean of messages, as the server gets it.
    """

    model: nn.Module
    loss: Loss
    layout: Layout
    params: Tensor
    update: Tensor
    clients: int
    num_examples: int
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    num_classes: int
    local: LocalSpec | None = None
    labels: Tensor | None = None
    defenses: tuple[Mapping[str, Any], ...] = ()
    auxiliary: Examples | None = None
    round: int = 0
    history: History | None = None
    buffers: Mapping[str, Tensor] | None = None
    released: bool = True

    @property
    def per_client(self) -> int:
        """Examples of one client, where all have as many."""
        return max(1, self.num_examples // self.clients)

    @property
    def local_steps(self) -> int:
        """u, the local steps of one client; 1 where local training is unknown."""
        return 1 if self.local is None else self.local.steps(self.per_client)

    @property
    def step_size(self) -> float:
        """η · u, what a client's gradients were multiplied by in all; 1 where local training is unknown."""
        if self.local is None:
            return 1.0
        return self.local.lr * self.local_steps

    @property
    def gradient(self) -> Tensor:
        """The update read as one gradient `[D]`: -update / (η · u)."""
        return -self.update / self.step_size


@dataclass(frozen=True)
class Reconstruction:
    """What an attack says the private batch was: x `[N, ...]`, y `[N]`.

    loss: the matching loss it ended with, the only score an adversary has. trace `[iterations]`: that
    loss over time. restart_losses `[R]`: where each restart ended (inf: diverged or dropped early).
    evaluations counts matching-loss gradients over all restarts. note says in words why the search ended,
    adaptation how the attack took the defenses into account, diagnosis what kept it from doing better as far
    as the adversary's own data tell.
    """

    x: Tensor
    y: Tensor
    loss: float
    trace: Tensor = field(default_factory=lambda: torch.empty(0))
    restart_losses: Tensor = field(default_factory=lambda: torch.empty(0))
    iterations: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    note: str = ""
    adaptation: str = ""
    diagnosis: tuple[str, ...] = ()
