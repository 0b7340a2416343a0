"""An adversary that looks on while a federation trains."""

from __future__ import annotations

from fltoolkit.attack import Attack
from fltoolkit.data import Dataset
from fltoolkit.rng import torch_stream
from fltoolkit.scoring import Scored, score, truth_of
from fltoolkit.threat import ThreatModel
from fltoolkit.training.task import Task
from fltoolkit.types import Transcript


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
        mean_image = self.data.train.x.mean(0)
        scored = score(found, truth, mean_image, self.data.input_range, self.data.num_classes)
        self.seen.append((number, scored))
