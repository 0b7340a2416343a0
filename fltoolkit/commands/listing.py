"""`list`: everything there is, one line each."""

from __future__ import annotations


def run_list() -> int:
    """Print every attack, defense, threat model, model, data set and partition."""
    from fltoolkit import registry
    from fltoolkit.data import DATASETS
    from fltoolkit.data.partition import PARTITIONS
    from fltoolkit.models import MODELS
    from fltoolkit.specs import options_of
    from fltoolkit.threat import THREATS

    attacks = {n: registry.attack_class(n) for n in registry.attack_names()}
    defenses = {n: registry.defense_class(n) for n in registry.defense_names()}
    sections = {
        "attacks": {n: registry.describe(c) for n, c in attacks.items()},
        "defenses": {_with_options(n, options_of(c)): registry.describe(c) for n, c in defenses.items()},
        "threat models": {n: t.about for n, t in THREATS.items()},
        "models": {n: m.about for n, m in MODELS.items()},
        "partitions": {_with_options(n, options_of(p)): p.about for n, p in PARTITIONS.items()},
        "data sets": {n: d.about for n, d in DATASETS.items()},
    }
    for title, entries in sections.items():
        print(f"{title}:")
        width = max(len(n) for n in entries)
        for name, about in entries.items():
            print(f"  {name.ljust(width)}  {about}")
    return 0


def _with_options(name: str, options: dict[str, object]) -> str:
    text = ",".join(f"{k}={v}" for k, v in options.items() if v is not None)
    return f"{name}:{text}" if text else name
