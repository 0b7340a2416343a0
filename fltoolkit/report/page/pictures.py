"""The grid of reconstructions: private images, and what the strongest attack made of them at each point."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fltoolkit.report.page import numbers, points

TINY = 64
"""Images narrower than so many pixels are enlarged without smoothing."""
BASE64 = re.compile(r"[A-Za-z0-9+/=\s]*")


@dataclass(frozen=True)
class Image:
    png: str
    alt: str
    psnr_db: float | None
    tiny: bool


@dataclass(frozen=True)
class Strip:
    """A line of images. place: the point's id, None for private images. numbers: names and values."""

    short: str
    label: str
    attack: str
    place: int | None
    numbers: tuple[tuple[str, str], ...]
    images: tuple[Image, ...]


@dataclass(frozen=True)
class Group:
    """Strips of one threat model under the same private images."""

    threat: str
    private: Strip
    strips: tuple[Strip, ...]


def groups(run: Mapping[str, Any]) -> list[Group]:
    """By threat model, then by the private images where they differ; in the order of the run."""
    found: dict[tuple[str, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    pictures = run.get("pictures") or {}
    for entry in pictures.get("recovered", []):
        truth = _truth(entry, pictures.get("victims", []))
        found.setdefault((entry["threat"], truth), []).append(entry)
    order = {t["name"]: i for i, t in enumerate(run["threats"])}
    keys = sorted(found, key=lambda k: order.get(k[0], len(order)))
    return [Group(t, _private(truth), tuple(_strips(run, found[t, truth]))) for t, truth in keys]


def _truth(entry: Mapping[str, Any], victims: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The private images of an entry: its own where it has them, else the victims of the run."""
    own = tuple(image["truth"] for image in entry["images"] if "truth" in image)
    return own or tuple(v["png"] for v in victims[: len(entry["images"])])


def _private(truth: Sequence[str]) -> Strip:
    images = tuple(_image(png, f"private image {i + 1}", None) for i, png in enumerate(truth))
    return Strip("Private images", "", "", None, (), images)


def _strips(run: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Iterator[Strip]:
    for entry in entries:
        place, point = next(
            (i, p)
            for i, p in enumerate(run["points"])
            if all(p[k] == entry[k] for k in ("defense", "strength", "threat"))
        )
        label = point["label"]
        images = tuple(
            _image(
                image["png"],
                f"private image {i + 1} as recovered under {label}, {image['psnr_db']:.1f} dB",
                image["psnr_db"],
            )
            for i, image in enumerate(entry["images"])
        )
        yield Strip(points.short(run, point), label, entry["attack"], place, _numbers(point), images)


def _numbers(point: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return (
        ("mean leak", f"{numbers.number(numbers.mean_of(point, 'leak_db'), 1)} dB"),
        ("accuracy", f"{100 * point['accuracy']['mean']:.1f} %"),
        ("ε", numbers.epsilon(point["epsilon"]["value"])),
    )


def _image(png: str, alt: str, psnr_db: float | None) -> Image:
    clean = png if BASE64.fullmatch(png) else ""
    return Image(clean, alt, psnr_db, _width(clean) < TINY)


def _width(png: str) -> int:
    """Pixels across, from the header of the PNG; 0 where it has none."""
    head = b64decode(png[:32] + "=" * (-len(png[:32]) % 4))
    return int.from_bytes(head[16:20], "big") if head[12:16] == b"IHDR" else 0
