"""The question that a trade-off answers, as it stands in a TOML file.

    seeds = [0, 1, 2]
    delta = 1e-5

    [federation]            # as the flags of `train`
    data = "digits"
    rounds = 60

    [leakage]
    attacks = ["idlg:adapt=true", "inverting:steps=300"]
    threats = ["server", "aggregate"]
    rounds = ["start", "middle", "end"]
    victims = 8

    [[defense]]
    name = "clip"
    stack = ["clip:norm={}"]
    values = [1, 0.3]       # or, without {}: stacks = [["clip:norm=1"], ["clip:norm=0.3"]]

`none`, the federation without defense, belongs to every grid.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from fltoolkit import registry
from fltoolkit.checks import check_searchable
from fltoolkit.errors import InputError, require, unknown
from fltoolkit.threat import THREATS
from fltoolkit.training.recipe import Kitchen, Recipe

Stack = tuple[str, ...]
PLACES = ("start", "middle", "end")
NONE = "none"


@dataclass(frozen=True)
class Curve:
    """A defense at growing strengths, each a list of specifications."""

    name: str
    stacks: tuple[Stack, ...]


@dataclass(frozen=True)
class Grid:
    """curves × seeds × threats × attacks over one federation.

    rounds: all rounds of it. attacked: those whose live updates are attacked. victims: observations an
    attacked round. delta: δ of every ε. threshold_db: PSNR above which an image counts as recovered.
    """

    recipe: Recipe
    rounds: int
    seeds: tuple[int, ...]
    attacked: tuple[int, ...]
    victims: int
    threats: tuple[str, ...]
    attacks: tuple[str, ...]
    curves: tuple[Curve, ...]
    delta: float = 1e-5
    threshold_db: float = 30.0

    def check(self) -> None:
        """Raise InputError before any work where the grid cannot be run."""
        require(self.rounds >= 1, "rounds of the federation", ">= 1", self.rounds)
        require(self.victims >= 1, "victims", ">= 1", self.victims)
        require(0 < self.delta < 1, "delta", "between 0 and 1", self.delta)
        for name in ("seeds", "attacked", "attacks", "threats"):
            values = getattr(self, name)
            require(len(values) > 0, name, "at least one", values)
            require(len(set(values)) == len(values), name, "all different", values)
        for n in self.attacked:
            require(1 <= n <= self.rounds, "rounds to attack", f"from 1 to {self.rounds}", n)
        for threat in self.threats:
            if threat not in THREATS:
                unknown("threat model", threat, THREATS)
        for attack in self.attacks:
            registry.make_attack(attack)
        self._check_names()
        for seed in self.seeds:
            replace(self.recipe, seed=seed).check()
        require(isfinite(self.threshold_db), "threshold_db", "a finite number", self.threshold_db)
        kitchen = Kitchen(replace(self.recipe, seed=self.seeds[0]))
        check_searchable(kitchen.data)
        for curve in self.curves:
            for stack in curve.stacks:
                kitchen.federation(stack).task.check(kitchen.data.input_shape)

    def _check_names(self) -> None:
        names = [c.name for c in self.curves]
        require(len(set(names)) == len(names), "names of defenses", "all different", names)
        require(all(c.stacks for c in self.curves), "stacks of a defense", "at least one", ())

    def plain(self) -> dict[str, Any]:
        """The grid as JSON has it."""
        federation = {k: v for k, v in asdict(self.recipe).items() if k != "seed"}
        return {
            "federation": federation | {"rounds": self.rounds},
            "seeds": list(self.seeds),
            "attack_rounds": list(self.attacked),
            "victims": self.victims,
            "delta": self.delta,
            "threshold_db": self.threshold_db,
            "threats": list(self.threats),
            "attacks": list(self.attacks),
            "defenses": [{"name": c.name, "stacks": [list(s) for s in c.stacks]} for c in self.curves],
        }


def read(path: str | Path) -> Grid:
    """The grid in a TOML file, or the built-in one called "default"; InputError names what is wrong in it."""
    try:
        text = _text(path)
    except OSError as e:
        raise InputError(f"grid must be a TOML file or 'default', got {str(path)!r}: {e}") from e
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"grid must be TOML, got {str(path)!r}: {e}") from e
    return grid_of(content)


def _text(path: str | Path) -> str:
    if str(path) == "default":
        return files("fltoolkit.tradeoff").joinpath("default.toml").read_text(encoding="utf-8")
    return Path(path).read_text(encoding="utf-8")


def grid_of(content: Mapping[str, Any]) -> Grid:
    """The grid in what a TOML file holds."""
    _only("key of the grid", content, ("seeds", "delta", "federation", "leakage", "defense"))
    federation = dict(_table(content, "federation"))
    leakage = _table(content, "leakage")
    _only("key of [leakage]", leakage, ("attacks", "threats", "rounds", "victims", "threshold_db"))
    rounds = _number(federation.pop("rounds", 30), "rounds of the federation")
    curves = [_curve(d) for d in _list(content, "defense", ())]
    if not any(c.name == NONE for c in curves):
        curves.insert(0, Curve(NONE, ((),)))
    return Grid(
        recipe=_recipe(federation),
        rounds=rounds,
        seeds=tuple(_number(s, "seeds") for s in _list(content, "seeds", [0])),
        attacked=tuple(dict.fromkeys(_round(r, rounds) for r in _list(leakage, "rounds", PLACES))),
        victims=_number(leakage.get("victims", 4), "victims"),
        threats=tuple(map(str, _list(leakage, "threats", ("server", "aggregate")))),
        attacks=tuple(map(str, _list(leakage, "attacks", ("idlg:adapt=true", "inverting")))),
        curves=tuple(curves),
        delta=_real(content.get("delta", 1e-5), "delta"),
        threshold_db=_real(leakage.get("threshold_db", 30.0), "threshold_db"),
    )


def _list(content: Mapping[str, Any], key: str, default: Sequence[Any]) -> Sequence[Any]:
    found = content.get(key, default)
    require(isinstance(found, list | tuple), key, "a list", found)
    return list(found)


def _real(value: Any, name: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    require(good, name, "a number", value)
    return float(value)


def _recipe(federation: Mapping[str, Any]) -> Recipe:
    known = {f.name: f.default for f in fields(Recipe) if f.name not in ("seed", "target")}
    _only("key of [federation]", federation, known)
    values = dict(federation)
    if values.get("batch") == "inf":
        values["batch"] = None
    for name, value in values.items():
        _same_kind(name, value, known[name])
    return Recipe(**values)


def _same_kind(name: str, value: Any, default: Any) -> None:
    """Refuse a value of another type than the field's default; whole numbers serve where real ones do."""
    if isinstance(default, bool) or isinstance(value, bool):
        good = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, float):
        good = isinstance(value, int | float)
    elif isinstance(default, str):
        good = isinstance(value, str)
    else:
        good = isinstance(value, int) or (name == "batch" and value is None)
    kind = "a whole number" if default is None else f"like {default!r}"
    require(good, f"{name} of [federation]", kind, value)


def _curve(entry: Mapping[str, Any]) -> Curve:
    _only("key of [[defense]]", entry, ("name", "stack", "stacks", "values"))
    name = entry.get("name")
    require(isinstance(name, str) and bool(name), "name of a [[defense]]", "a text", name)
    if "stacks" in entry:
        return Curve(str(name), tuple(_stack(s) for s in _list(entry, "stacks", ())))
    stack = _stack(entry.get("stack", []))
    if "values" not in entry:
        return Curve(str(name), (stack,))
    if not any("{}" in s for s in stack):
        raise InputError(f"stack of defense {name!r} must hold {{}} where values go, got {list(stack)}")
    return Curve(str(name), tuple(tuple(s.replace("{}", str(v)) for s in stack) for v in entry["values"]))


def _stack(value: Any) -> Stack:
    good = isinstance(value, Sequence) and not isinstance(value, str)
    require(good and all(isinstance(s, str) for s in value), "stack", "a list of defenses", value)
    return tuple(value)


def _round(value: Any, rounds: int) -> int:
    if value in PLACES:
        return {"start": 1, "middle": (rounds + 1) // 2, "end": rounds}[value]
    return _number(value, "rounds to attack")


def _number(value: Any, name: str) -> int:
    require(isinstance(value, int) and not isinstance(value, bool), name, "a whole number", value)
    return int(value)


def _table(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = content.get(name, {})
    require(isinstance(value, Mapping), f"[{name}]", "a table", value)
    return dict(value)


def _only(kind: str, given: Mapping[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            unknown(kind, key, known)
