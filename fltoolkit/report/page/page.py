"""One HTML file from the content of a run.json: style, script, pictures and chart are inside it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fltoolkit.report.page import chart, facts, made, numbers, pictures, points, table, words

HERE = "fltoolkit.report.page"
SCHEMA = "fltoolkit.tradeoff/1"


def page(run: Mapping[str, Any]) -> str:
    """The page of a run of schema fltoolkit.tradeoff/1. Everything that the run names is escaped."""
    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": numbers.duration,
        "number": numbers.number,
        "breakable": numbers.breakable,
    }
    return environment.get_template("page.html.j2").render(_content(run))


def _content(run: Mapping[str, Any]) -> dict[str, Any]:
    ask, setting = made.question(run)
    panels = chart.panels(run)
    return {
        "run": run,
        "ask": ask,
        "setting": setting,
        "values": made.setting(run),
        "says": [facts.says(run, t["name"]) for t in run["threats"]],
        "panels": panels,
        "shapes": chart.shape_legend(run),
        "epsilons": chart.epsilon_legend(run),
        "per_example": any(p["epsilon"]["unit"] == "example" for p in run["points"]),
        "groups": pictures.groups(run),
        "columns": table.COLUMNS,
        "rows": table.rows(run),
        "words": [(t["name"], *words.threat(t)) for t in run["threats"]],
        "metrics": words.metrics(run["grid"]),
        "refused": made.refused(run),
        "failed": run.get("failed", []),
        "toml": made.as_toml(run),
        "details": {
            i: {"label": points.short(run, p), "threat": p["threat"], "rows": _details(run, p)}
            for i, p in enumerate(run["points"])
            if p["leak_db"] is not None
        },
        "style": Markup(_text("style.css")),
        "script": Markup(_text("script.js")),
    }


def _details(run: Mapping[str, Any], point: points.Point) -> list[tuple[str, str]]:
    """The tooltip's lines; what the defense is made of, where its short name does not say it."""
    named = points.short(run, point) == point["label"]
    return ([] if named else [("made of", point["label"])]) + points.details(point)


def _text(name: str) -> str:
    return files(HERE).joinpath(name).read_text(encoding="utf-8")
