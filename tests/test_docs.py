"""The code in the documentation runs, and the README's table names what there is."""

from __future__ import annotations

import json
import math
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from scipy import stats

from fltoolkit import registry
from fltoolkit.data import DATASETS
from fltoolkit.models import MODELS
from fltoolkit.report.terminal import table
from fltoolkit.tables import cells, figure1, show
from fltoolkit.threat import THREATS
from fltoolkit.tradeoff import read, result
from fltoolkit.tradeoff.grid import grid_of

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
def test_readme_python_does_what_its_comment_says(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    execute(block, tmp_path)
    label, apart = re.fullmatch(r"tensor\(\[(\d)\]\) tensor\((.+?)\)\s*", capsys.readouterr().out).groups()
    assert label == "7"
    assert float(apart) < 0.05


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
    result = committed("dlg_strength.json")
    for cell in result["cells"].values():
        rate = cell["above_30_db"]
        share = f"{rate['value']:.0%} [{rate['ci95'][0]:.0%}, {rate['ci95'][1]:.0%}]"
        row = f"| {share} | {cell['psnr_db']['median']:.1f} dB | {cell['seconds_per_image']:.1f} s |"
        assert row in text
    assert f"costs {result['evaluation']['ratio']['median']:.2f} of the plain one" in text
    assert result["command"].removeprefix("python ") in text


@pytest.mark.parametrize("model", ["2nn", "cnn", "lstm"])
def test_times_in_the_readme_are_those_of_the_committed_run(model):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    result = committed(f"fedavg_speed_{model}.json")
    seconds, ratios = result["seconds_per_round"]["ours"]["median"], result["ratio_to_ours"]
    time = f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    names = ("plain", "pfl", "pfl-2", "fedjax", "flower")
    cells = [f"{ratios[n]['median']:.1f}×" if n in ratios else "" for n in names]
    assert f"| {time} | {' | '.join(cells)} | {result['ratio_to_floor']['ours']:.1f} |" in text
    assert all(same in (True, None) for same in result["training_loss"]["same_work"].values())
    if model == "lstm":
        assert f"takes {ratios['lean']['median']:.1f}×" in text
        assert f"another model, {ratios['lean-nn']['median']:.2f}×" in text


def test_growth_in_the_readme_is_that_of_the_committed_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    result = committed("fedavg_scale.json")
    peak = result["measured"]["cohort of 1000"]["growth_mib"]["median"]
    assert f"peaks at {peak:.0f} MiB" in text
    assert f"takes {result['idle']['most_to_fewest']['seconds']['median']:.2f} times" in text
    assert result["memory"]["under_limit"]


def test_tables_in_the_documentation_are_those_of_the_committed_cells():
    text = (ROOT / "docs/fedavg-tables.md").read_text(encoding="utf-8")
    folders = [f for f in (ROOT / "benchmarks/results/tables").iterdir() if f.name in cells.names()]
    assert folders
    for folder in folders:
        table = cells.table(folder.name)
        results = show.read_results(table, folder)
        printed = show.render(table, results).split("\nPaper:")[0].rstrip()
        assert not results or printed in text, f"docs/fedavg-tables.md does not show {folder.name} as it is"
    drawn = figure1.render(committed("tables/figure1/figure1.json")).split("\nPaper:")[0].rstrip()
    assert drawn in text


def test_spread_of_the_papers_own_runs_in_the_documentation_is_that_of_its_tables():
    text = " ".join((ROOT / "docs/fedavg-tables.md").read_text(encoding="utf-8").split())
    paper = [
        {(c.B, c.partition): c.paper_rounds for c in cells.table(name).cells if (c.C, c.E) == (0.1, 5)}
        for name in ("table1-cnn", "table2-mnist")
    ]
    both = paper[0].keys() & paper[1].keys()
    assert len(both) == 4
    total = sum(math.log(paper[0][k] / paper[1][k]) ** 2 for k in both)
    mid, low, high = (math.sqrt(total / q) for q in (4, *stats.chi2.interval(0.95, 4)[::-1]))
    spread = f"standard deviation is {mid:.2f}, with a 95 % interval from {low:.2f} to {high:.2f}"
    assert spread + " on these four pairs" in text
    shares = [100 * (2 * stats.norm.cdf(math.log(1.5) / d) - 1) for d in (mid, high, low)]
    inside, least, most = (f"{share:.0f} %" for share in shares)
    assert f"within 1.5x of the first in {inside} of the cells, somewhere from {least} to {most}" in text


@pytest.mark.parametrize("name", ["default", "privacy"])
def test_trade_offs_in_the_documentation_are_those_of_the_committed_runs(name):
    text = (ROOT / "docs/tradeoff.md").read_text(encoding="utf-8")
    run = committed(f"tradeoff/{name}/run.json")
    assert table(result.HEAD, list(result.lines(run))) in text
    assert read(GRIDS.get(name, name)).plain() == run["grid"], "the grid is no longer the one that was run"


GRIDS = {"privacy": ROOT / "benchmarks/grids/privacy.toml"}


def test_example_of_a_grid_in_the_documentation_is_one_that_can_run():
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/tradeoff.md").read_text("utf-8"), re.DOTALL)
    grid_of(tomllib.loads(text)).check()


def committed(name):
    return json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))
