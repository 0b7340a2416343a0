"""Pictures of a grid: private images beside what came back of them at each strength of a defense."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fltoolkit.tradeoff.jobs import Attacking

Found = Mapping[str, Mapping[str, Any]]
"""What every job found, by its id."""


def pictured(attacks: Mapping[str, Sequence[Attacking]], found: Found) -> list[dict[str, Any]]:
    """The images of the first attacked round of the first seed, as the attack left them that got nearest."""
    seen = []
    for attack, jobs in attacks.items():
        rounds = found[jobs[0].id].get("rounds", [])
        if rounds and rounds[0]["images"]:
            seen.append({"attack": attack, "round": rounds[0]["round"], "images": rounds[0]["images"]})
    return [max(seen, key=lambda s: fmean(i["psnr_db"] for i in s["images"]))] if seen else []


def side_by_side(recovered: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The private images once, under "victims"; an image recovered of another one keeps its own "truth"."""
    if not recovered:
        return {"victims": [], "recovered": []}
    victims = [i["truth"] for i in recovered[0]["images"]]

    def brief(image: dict[str, Any], place: int) -> dict[str, Any]:
        same = place < len(victims) and image["truth"] == victims[place]
        return {k: v for k, v in image.items() if k != "truth" or not same}

    rows = [r | {"images": [brief(i, n) for n, i in enumerate(r["images"])]} for r in recovered]
    return {"victims": [{"png": v} for v in victims], "recovered": rows}


def png(image: Tensor, input_range: tuple[float, float]) -> str:
    """`[C, H, W]` in the input range -> PNG in base 64."""
    from PIL import Image

    low, high = input_range
    scaled = ((image.detach().cpu() - low) / (high - low)).clamp(0, 1)
    pixels = (255 * scaled).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    room = BytesIO()
    picture.save(room, "PNG", optimize=True)
    return b64encode(room.getvalue()).decode()


def decoded(picture: str) -> np.ndarray:
    """A PNG in base 64 -> its pixels `[H, W]` or `[H, W, 3]`, 0 to 255."""
    from PIL import Image

    with Image.open(BytesIO(b64decode(picture))) as image:
        return np.asarray(image)
