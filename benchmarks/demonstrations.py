"""What each paper on gradient inversion shows, shown again here with its attack, at a size for two cores.

    python benchmarks/demonstrations.py                # those that are missing
    python benchmarks/demonstrations.py --only dlfa --redo
    python benchmarks/demonstrations.py --show         # the table of those that are done

A demonstration is a claim of the paper and a comparison that could refute it: the paper's attack, as it is by
default, beside what the paper sets it against, on the same victims. Labels are inferred, images are real, the
adversary's public data are another part of the same data set. Each writes NAME.json and a picture NAME.png.
Intervals are over victims.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from inversion import WEIGHTS, rounded, summary
from inversion_cells import dataset, trained
from torch import nn

from fltoolkit.audit import Result, Scene, run
from fltoolkit.errors import InputError, unknown
from fltoolkit.metrics.interval import mean_interval
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.report.notebook import lineup
from fltoolkit.report.terminal import Bar, table
from fltoolkit.types import LocalSpec

RESULTS = Path(__file__).parent / "results" / "demonstrations"
SCHEMA = "fltoolkit.demonstration/1"
THRESHOLD_DB = 20.0


@dataclass(frozen=True)
class Demonstration:
    """A claim and its test.

    paper: who claims it. claim: in one sentence. ours: what is smaller or other than in the paper. sides: the
    attacks by what they are here, the paper's first. weights: "untrained" or "trained", as in
    benchmarks/inversion.py. sends_buffers: clients normalise by their batch and send BatchNorm's buffers;
    otherwise BatchNorm is frozen. The rest is the scene.
    """

    name: str
    paper: str
    claim: str
    ours: str
    sides: dict[str, str]
    data: str
    model: str
    weights: str = "untrained"
    batch: int = 1
    local: LocalSpec = field(default_factory=lambda: LocalSpec(1, None, 0.1))
    defenses: tuple[str, ...] = ()
    victims: int = 4
    sends_buffers: bool = False


def shallow(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two 3x3 convolutions of 16 channels with BatchNorm and ReLU, the second of stride 2; a linear layer."""
    side = -(-shape[1] // 2)
    return nn.Sequential(
        *(nn.Conv2d(shape[0], 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * side**2, classes)),
    )


ONE = "inverting:simulate=false"
YIN = "gradinversion:steps=1500,restarts=1,bn=0.1"
DEMONSTRATIONS = (
    Demonstration(
        "dlg",
        "Zhu, Liu, Han 2019, arXiv:1906.08935",
        "A photograph and its label come back from one gradient of a LeNet with sigmoids.",
        "CIFAR-10 in place of CIFAR-100.",
        {"DLG": "dlg"},
        "cifar10",
        "lenet",
        victims=6,
    ),
    Demonstration(
        "idlg",
        "Zhao, Mopuri, Bilen 2020, arXiv:2001.02610",
        "The label is read off the last layer, none is missed, and the image comes back.",
        "MNIST; one start each, as in the paper.",
        {"iDLG": "idlg:restarts=1", "DLG": "dlg:restarts=1"},
        "mnist",
        "lenet",
        victims=10,
    ),
    Demonstration(
        "inverting",
        "Geiping et al. 2020, arXiv:2003.14053",
        "Through a deep network of ReLUs, cosine and total variation find what a squared distance misses.",
        "ConvNet of width 16 in place of 64, untrained.",
        {"cosine, TV, signed Adam": "inverting", "squared, L-BFGS": "idlg:restarts=1,steps=1000"},
        "cifar10",
        "convnet16",
        victims=3,
    ),
    Demonstration(
        "gradinversion",
        "Yin et al. 2021, arXiv:2104.07586, and Huang et al. 2021, arXiv:2112.00059",
        "BatchNorm's statistics of a batch make its images come back better, those of other images less.",
        "CIFAR-10, two convolutions of width 16, untrained, 1,500 iterations and one seed, in place of a "
        "ResNet-50. Clients send BatchNorm's buffers along.",
        {
            "the batch's statistics": f"{YIN},statistics=sent",
            "of public images": f"{YIN},statistics=estimated",
            "none": f"{YIN},statistics=none",
        },
        "cifar10",
        "demonstrations:shallow",
        batch=4,
        victims=6,
        sends_buffers=True,
    ),
    Demonstration(
        "generative",
        "Jeon et al. 2021, arXiv:2110.14962, and Fang et al. 2023, arXiv:2308.04699",
        "A generator of such images helps where a defense has taken much of the gradient.",
        "MNIST and a small generator that is trained on public digits.",
        {"generator": "generative", "pixels": "inverting:steps=1000"},
        "mnist",
        "mlp",
        defenses=("clip:norm=0.5", "gaussian:noise_multiplier=0.01,placement=client"),
        victims=4,
    ),
    Demonstration(
        "learned",
        "Wu et al. 2023, arXiv:2210.10880",
        "A network that learnt to read compressed updates beats searches on them.",
        "LeNet on CIFAR-10 behind sign compression; 8,192 simulated updates.",
        {"learned": "learned", "searched": "inverting:steps=1500"},
        "cifar10",
        "lenet",
        "trained",
        defenses=("sign",),
        victims=6,
    ),
    Demonstration(
        "dlfa",
        "Dimitrov et al. 2022, arXiv:2206.12395",
        "Guesses for each epoch, run through the local training, recover images where one gradient does not.",
        "FEMNIST, 2NN, 2 epochs of 3 batches of 2 images at rate 0.02 in place of 10 of 10 batches of 5 at "
        "0.004; four assignments of labels are tried.",
        {"each epoch": "dlfa:restarts=4", "as one gradient": ONE},
        "femnist",
        "2nn",
        batch=6,
        local=LocalSpec(2, 2, 0.02),
        victims=4,
    ),
    Demonstration(
        "sme",
        "Zhu, Yao, Blaschko 2023, arXiv:2306.00127",
        "One gradient at a model between the two ends of local training stands for many local steps.",
        "FEMNIST, LeNet, 20 epochs of one batch of 4 images.",
        {"surrogate": "sme", "at the model sent out": ONE},
        "femnist",
        "lenet",
        batch=4,
        local=LocalSpec(20, None, 0.004),
        victims=4,
    ),
)


def perform(
    demo: Demonstration, seed: int, weights: Path, folder: Path, bar: Bar, device: str = "cpu"
) -> dict[str, Any]:
    """Run every side on the same victims and write NAME.json and NAME.png."""
    data, accuracy = dataset(demo.data)[0], None
    model: Any = demo.model
    if demo.weights == "trained":
        model, accuracy = trained(demo.model, demo.data, seed, weights, bar, device)
    results: dict[str, Result] = {}
    for side, attack in demo.sides.items():
        scene = Scene(
            attack=attack,
            data=data,
            model=model,
            batch=demo.batch,
            victims=demo.victims,
            local=demo.local,
            defenses=demo.defenses,
            frozen_norm=not demo.sends_buffers,
            sends_buffers=demo.sends_buffers,
            seed=seed,
            device=device,
            threshold_db=THRESHOLD_DB,
        )
        results[side] = run(scene, bar)
    found = {
        "schema": SCHEMA,
        "demonstration": asdict(demo),
        "test_accuracy": accuracy,
        "sides": {side: summary(r.report, r.victims) for side, r in results.items()},
        "behind_first_db": behind(results),
        "seed": seed,
        "device": device,
        "note": data.note,
        "command": command(demo, seed, device),
        "versions": document.versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    picture = lineup(results, demo.claim)
    (folder / f"{demo.name}.png").write_bytes(picture.png)
    write_json(folder / f"{demo.name}.json", rounded(found))
    return found


def behind(results: dict[str, Result]) -> dict[str, Any]:
    """By how much each other side's PSNR is below the first's, with an interval over the victims, which all
    sides have in common."""
    first, *others = (torch.tensor([float(v.psnr.mean()) for v in r.victims]) for r in results.values())
    gaps = [mean_interval((first - other).tolist()) for other in others]
    return {s: {k: g[k] for k in ("mean", "ci95")} for s, g in zip(list(results)[1:], gaps, strict=True)}


def command(demo: Demonstration, seed: int, device: str) -> str:
    words = f"python benchmarks/demonstrations.py --only {demo.name} --seed {seed}"
    return words if device == "cpu" else f"{words} --device {device}"


def render(done: Sequence[dict[str, Any]]) -> str:
    """A line for each side of each demonstration."""
    rows = []
    for found in done:
        for i, (side, s) in enumerate(found["sides"].items()):
            m = s["metrics"]
            low, high = m["psnr_db"]["ci95"]
            psnr = f"{m['psnr_db']['mean']:.1f} [{low:.1f}, {high:.1f}]"
            gain, above = f"{m['psnr_gain_db']['mean']:+.1f}", f"{m['success']['value']:.0%}"
            labels, images = f"{m['label_accuracy']['mean']:.0%}", str(s["images"])
            seconds = f"{s['seconds'] / s['victims']:.0f}"
            name = "" if i else found["demonstration"]["name"]
            gap = found.get("behind_first_db", {}).get(side)
            less = f"{gap['mean']:.1f} [{gap['ci95'][0]:.1f}, {gap['ci95'][1]:.1f}]" if gap else ""
            rows.append((name, side, psnr, less, gain, above, labels, images, seconds))
    head = (
        "",
        "",
        "PSNR, dB",
        "behind, dB",
        "gain, dB",
        f"above {THRESHOLD_DB:g} dB",
        "labels",
        "images",
        "s a victim",
    )
    return table(head, rows)


def read(folder: Path) -> list[dict[str, Any]]:
    """The demonstrations in `folder`, in their order."""
    paths = [folder / f"{d.name}.json" for d in DEMONSTRATIONS]
    return [json.loads(p.read_text()) for p in paths if p.exists()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="this demonstration alone, by its name")
    parser.add_argument("--seed", type=int, default=0, help="seed of all streams (default: 0)")
    parser.add_argument("--device", default="cpu", help="where searches run (default: cpu)")
    parser.add_argument("--redo", action="store_true", help="run again what is done")
    parser.add_argument("--show", action="store_true", help="run nothing, print the table of what is done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the trained models")
    options = parser.parse_args(argv)
    try:
        names = [d.name for d in DEMONSTRATIONS]
        if options.only is not None and options.only not in names:
            unknown("demonstration", options.only, names)
        for demo in DEMONSTRATIONS:
            wanted = options.only in (None, demo.name) and not options.show
            if wanted and (options.redo or not (options.out / f"{demo.name}.json").exists()):
                bar = Bar(demo.name, every=20.0)
                perform(demo, options.seed, options.weights, options.out, bar, options.device)
                bar.close()
        print(render(read(options.out)))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
