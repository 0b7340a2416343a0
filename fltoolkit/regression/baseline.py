"""The baseline: what is measured, and what came out when somebody last said that it may."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fltoolkit.audit import Scene
from fltoolkit.errors import InputError, require, unknown
from fltoolkit.report.files import write_json
from fltoolkit.types import LocalSpec

SCHEMA = "fltoolkit/leakage-1"
ALPHA = 0.01
VICTIMS = 12


@dataclass(frozen=True)
class Case:
    """One thing that is measured: the flags of an audit by their names. max_psnr_db: a limit that holds
    whatever the baseline says (None: none)."""

    attack: str = "idlg"
    data: str = "digits"
    model: str = "mlp"
    batch: int = 1
    victims: int = VICTIMS
    clients: int | None = None
    threat: str | None = None
    defenses: tuple[str, ...] = ()
    local_epochs: int = 1
    local_batch: int | None = None
    lr: float = 1.0
    max_psnr_db: float | None = None

    def __post_init__(self) -> None:
        require(self.victims >= 2, "victims", ">= 2", self.victims)

    def scene(self, seed: int, **objects: Any) -> Scene:
        """The scene with this seed; objects: ready ones in the place of named ones, such as a model."""
        values: dict[str, Any] = {
            "attack": self.attack,
            "data": self.data,
            "model": self.model,
            "batch": self.batch,
            "victims": self.victims,
            "clients": self.clients,
            "threat": self.threat,
            "defenses": self.defenses,
            "local": LocalSpec(self.local_epochs, self.local_batch, self.lr),
            "seed": seed,
        }
        return Scene(**(values | objects))


@dataclass(frozen=True)
class Entry:
    """A case with what was measured: values by metric, one a victim, under `seed`, and why they are
    accepted."""

    case: Case
    measured: Mapping[str, list[float]] = field(default_factory=dict)
    seed: int = 0
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """Entries by name. alpha: the chance that a check of all of them alarms although nothing changed."""

    entries: Mapping[str, Entry]
    alpha: float = ALPHA

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Raises InputError where the file is not there, no baseline, or names what there is not."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise InputError(f"baseline must be a file that can be read, got {str(path)!r}: {e}") from e
        except json.JSONDecodeError as e:
            raise InputError(f"baseline must be JSON, got {str(path)!r}: {e}") from e
        require(isinstance(content, dict), "baseline", "a JSON object", type(content).__name__)
        require(
            content.get("schema") == SCHEMA, "schema of the baseline", repr(SCHEMA), content.get("schema")
        )
        alpha, entries = content.get("alpha", ALPHA), content.get("entries")
        require(isinstance(alpha, float) and 0 < alpha < 1, "alpha", "a number between 0 and 1", alpha)
        require(isinstance(entries, dict), "entries of the baseline", "a JSON object", entries)
        return cls({n: _entry(n, e) for n, e in entries.items()}, alpha)

    def save(self, path: Path) -> None:
        """Write it, sorted by name and with what is as usual left out of cases."""
        usual = asdict(Case())
        entries = {}
        for name, e in sorted(self.entries.items()):
            case = {k: v for k, v in asdict(e.case).items() if v != usual[k]}
            rest = {
                "measured": dict(e.measured),
                "seed": e.seed,
                "reason": e.reason,
                "versions": dict(e.versions),
            }
            entries[name] = {**case, **rest}
        write_json(path, {"schema": SCHEMA, "alpha": self.alpha, "entries": entries})


def _entry(name: str, content: Any) -> Entry:
    require(isinstance(content, dict), f"{name!r} in the baseline", "a JSON object", content)
    own = {f.name for f in fields(Entry)} - {"case"}
    case = {k: v for k, v in content.items() if k not in own}
    known = {f.name for f in fields(Case)}
    for key in case:
        if key not in known:
            unknown(f"field of {name!r} in the baseline", key, known | own)
    if "defenses" in case:
        case["defenses"] = tuple(case["defenses"])
    for key, value in case.items():
        usual = getattr(Case(), key)
        good = usual is None or type(value) is type(usual) or (type(usual), type(value)) == (float, int)
        require(good, f"{key} of {name!r} in the baseline", f"of type {type(usual).__name__}", value)
    return Entry(Case(**case), **{k: v for k, v in content.items() if k in own})
