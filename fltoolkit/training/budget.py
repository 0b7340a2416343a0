"""What privacy a run has spent, and whether it may go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

from fltoolkit.accounting import Rounds, epsilon_by_view
from fltoolkit.defense import Defense
from fltoolkit.errors import InputError
from fltoolkit.types import PrivacyEvent

if TYPE_CHECKING:
    from fltoolkit.training.federation import Federation

UNITS = ("client", "example")


@dataclass
class Budget:
    """The events of the rounds so far, in separate ledgers for clients and examples.

    limit: the largest ε that any view that is protected at all may reach, in either ledger (inf: no limit).
    messages_hidden: whether a secure sum hides single messages. delta: δ of every ε.
    """

    messages_hidden: bool
    delta: float
    limit: float = inf
    rounds: list[tuple[PrivacyEvent, ...]] = field(default_factory=list)

    def spend(self, events: tuple[PrivacyEvent, ...]) -> None:
        self.rounds.append(events)

    def spent(self, more: Rounds = ()) -> dict[str, dict[str, float]]:
        """ε by unit and view over the rounds so far and those in `more`; units that nothing protects are
        left out, views that nothing protects are ∞."""
        rounds = [*self.rounds, *more]
        units = [u for u in UNITS if any(e.unit == u for events in rounds for e in events)]
        return {u: epsilon_by_view(rounds, self.messages_hidden, self.delta, u) for u in units}

    def allows(self, events: tuple[PrivacyEvent, ...]) -> bool:
        """Whether a round with these events stays within the limit."""
        if self.limit == inf:
            return True
        return self.largest(self.spent([events])) <= self.limit

    @staticmethod
    def largest(spent: dict[str, dict[str, float]]) -> float:
        """The largest finite ε of any ledger and view; 0 where there is none."""
        finite: Sequence[float] = [e for views in spent.values() for e in views.values() if e < inf]
        return max(finite, default=0.0)


def calibrated(
    defenses: Sequence[Defense],
    federation: Callable[[Sequence[Defense]], Federation],
    rounds: int,
    epsilon: float,
    delta: float,
) -> tuple[Defense, ...]:
    """`defenses` with the smallest noise multiplier found with which `rounds` rounds of the federation they
    make cost at most `epsilon` in every view that is protected at all.

    Within 1e-4 of the smallest, never below it. Raises InputError where there is not exactly one noise
    multiplier to set.
    """
    noisy = [i for i, d in enumerate(defenses) if hasattr(d, "noise_multiplier")]
    if len(noisy) != 1:
        raise InputError(f"epsilon must come with one defense that has a noise_multiplier, got {len(noisy)}")

    def with_noise(sigma: float) -> tuple[Defense, ...]:
        changed: Any = defenses[noisy[0]]
        return (*defenses[: noisy[0]], replace(changed, noise_multiplier=sigma), *defenses[noisy[0] + 1 :])

    def cost(sigma: float) -> float:
        f = federation(with_noise(sigma))
        budget = Budget(f.task.stack.hides_messages, delta)
        spent = budget.spent([f.events_of(n) for n in range(1, rounds + 1)])
        if not any(e < inf for views in spent.values() for e in views.values()):
            raise InputError("epsilon must come with a defense that bounds it in some view, got none")
        return budget.largest(spent)

    return with_noise(smallest(lambda sigma: cost(sigma) <= epsilon))


def smallest(holds: Callable[[float], bool], tolerance: float = 1e-4) -> float:
    """The smallest x > 0 at which `holds`, which holds from there on, found from above by bisection of its
    logarithm to a relative `tolerance`."""
    high = 1.0
    while not holds(high):
        high *= 2
        if high > 1e9:
            raise InputError("epsilon must be within reach of some noise, got one below any")
    low = high / 2
    while low > 1e-6 and holds(low):
        low, high = low / 2, low
    while high / low > 1 + tolerance:
        middle = sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
