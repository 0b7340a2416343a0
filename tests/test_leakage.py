"""The toolkit's own leakage: every attack and every defense against leakage.json."""

from __future__ import annotations

from pathlib import Path

from fltoolkit import registry
from fltoolkit.regression.baseline import Baseline
from fltoolkit.regression.gate import check, failures
from fltoolkit.regression.show import text

FILE = Path(__file__).parents[1] / "leakage.json"


def test_every_attack_and_every_defense_is_guarded():
    cases = [e.case for e in Baseline.load(FILE).entries.values()]
    attacks = {c.attack.partition(":")[0] for c in cases}
    defenses = {d.partition(":")[0] for c in cases for d in c.defenses}
    assert attacks == set(registry.attack_names())
    assert defenses == set(registry.defense_names())


def test_nothing_leaks_otherwise_than_the_baseline_says():
    """In either direction. What is meant is accepted by `python -m fltoolkit leakage update --reason WHY`."""
    verdicts = check(Baseline.load(FILE), seed=1)
    assert not failures(verdicts), text(verdicts, FILE.name)
