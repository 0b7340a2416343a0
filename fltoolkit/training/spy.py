"""An adversary that looks on while a federation trains."""

from __future__ import annotations

from pathlib import Path

import torch

from fltoolkit.attack import Attack
from fltoolkit.data import Dataset
from fltoolkit.report.files import write_atomic
from fltoolkit.rng import torch_stream
from fltoolkit.scoring import Scored, score, truth_of
from fltoolkit.threat import ThreatModel
from fltoolkit.training.task import Task
from fltoolkit.types import Examples, Reconstruction, Transcript


class Spy:
    """Every `every` rounds, attack the first client of the cohort as the threat model sees it.

    seen: `(round, score)` of each look so far. An attack of None never looks.
    """

    def __init__(
        self, attack: Attack | None, threat: ThreatModel, task: Task, data: Dataset, every: int
    ) -> None:
        self.attack, self.threat, self.task, self.data, self.every = attack, threat, task, data, every
        self.seen: list[tuple[int, Scored]] = []

    def wants(self, number: int) -> bool:
        return self.attack is not None and (number - 1) % self.every == 0

    def __call__(self, transcript: Transcript) -> None:
        assert self.attack is not None
        number = transcript.updates.round
        observation = self.threat.observe(transcript, 0, self.task.public(self.data))
        rng = torch_stream(self.task.seed, "round", number, "attack", self.attack.name)
        found = self.attack.many([observation], [rng])[0]
        truth = truth_of(transcript, self.threat.members(transcript, 0))
        self.seen.append((number, self._scored(found, truth)))

    def _scored(self, found: Reconstruction, truth: Examples) -> Scored:
        return score(found, truth, self.data.train.x.mean(0), self.data.input_range, self.data.num_classes)

    def save(self, path: Path, what: str) -> None:
        """Keep what was seen so far, if anything, whole or not at all. what: who looked, and how."""
        looks = [
            (n, s.found.x.cpu(), s.found.y.cpu(), s.found.loss, s.found.trace.cpu(), s.truth.x, s.truth.y)
            for n, s in self.seen
        ]
        if looks:
            write_atomic(path, lambda p: torch.save({"what": what, "looks": looks}, p))

    def restore(self, path: Path, what: str, until: int) -> None:
        """Take up what was saved of rounds up to `until`, where the same one looked."""
        if not path.exists():
            return
        content = torch.load(path, weights_only=True)
        if content["what"] == what:
            self.seen = [
                (n, self._scored(Reconstruction(x, y, loss, trace), Examples(true_x, true_y)))
                for n, x, y, loss, trace, true_x, true_y in content["looks"]
                if n <= until
            ]
