"""The code in the documentation runs, and the README's table names what there is."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from fltoolkit import registry
from fltoolkit.data import DATASETS
from fltoolkit.models import MODELS
from fltoolkit.threat import THREATS

ROOT = Path(__file__).parents[1]


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def execute(code, folder):
    script = folder / "block.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script), run_name="block")


def test_added_defense_runs(capsys, tmp_path):
    (code,) = blocks("docs/add-a-defense.md")
    execute(code, tmp_path)
    assert "ε of the message: None" in capsys.readouterr().out


def test_added_attack_runs_and_is_exact(capsys, tmp_path):
    (code,) = blocks("docs/add-an-attack.md")
    execute(code, tmp_path)
    psnr, accuracy = re.match(r"([\d.]+) dB; labels: ([\d.]+)", capsys.readouterr().out).groups()
    assert float(psnr) > 80
    assert float(accuracy) == 1.0


@pytest.mark.parametrize("block", blocks("README.md"))
def test_readme_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(block, tmp_path)


def test_readme_names_everything_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in [*registry.attack_names(), *registry.defense_names(), *THREATS, *MODELS, *DATASETS]:
        assert f"`{name}" in text, f"README does not name {name}"


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_numbers_in_the_readme_are_those_of_the_committed_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks/results/dlg_strength.json").read_text(encoding="utf-8"))
    for cell in result["cells"].values():
        rate = cell["above_30_db"]
        share = f"{rate['value']:.0%} [{rate['ci95'][0]:.0%}, {rate['ci95'][1]:.0%}]"
        row = f"| {share} | {cell['psnr_db']['median']:.1f} dB | {cell['seconds_per_image']:.1f} s |"
        assert row in text
    assert f"costs {result['evaluation']['ratio']['median']:.2f} of the plain one" in text
    assert result["command"].removeprefix("python ") in text
