"""The notebooks: complete, executed in order, without logic; what runs them, what draws for them."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_examples, tiny_model
from PIL import Image

from fltoolkit.audit import Scene
from fltoolkit.audit import run as audit
from fltoolkit.data import Dataset
from fltoolkit.errors import InputError
from fltoolkit.report import notebook
from fltoolkit.report.figures import accuracy_figure
from fltoolkit.training.evaluate import Evaluation
from fltoolkit.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CHEAPEST = "05_fedavg_tables"
MOST_BYTES = 600_000
LOGIC = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.For, ast.AsyncFor, ast.While, ast.If, ast.IfExp, ast.Try, ast.TryStar, ast.Match),
)
MACHINE = re.compile(r"(?<![\w.])/(home|root|work|tmp|Users|opt|usr|var|mnt)/")


def load_runner():
    spec = importlib.util.spec_from_file_location("notebook_runner", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load_runner()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code(document):
    return [c for c in document["cells"] if c["cell_type"] == "code"]


def logic(source):
    return [type(n).__name__ for n in ast.walk(ast.parse(source)) if isinstance(n, LOGIC)]


def texts(document):
    """All that is written in a notebook and its outputs; pictures left out."""
    for cell in document["cells"]:
        yield "".join(cell["source"])
        for out in cell.get("outputs", ()):
            yield "".join(out.get("text", ()))
            data = out.get("data", {})
            yield from ("".join(v) for kind, v in data.items() if kind.startswith("text/"))


def has_image(cell):
    return any("image/png" in out.get("data", {}) for out in cell["outputs"])


# --- what is committed ----------------------------------------------------------------------------------


def test_there_are_notebooks():
    assert {"01_first_leak", "04_secure_aggregation", CHEAPEST} <= {p.stem for p in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_whole_executed_in_order_and_says_what_its_pictures_show(path):
    document = read(path)
    cells = document["cells"]
    assert document["nbformat"] == 4
    assert path.stat().st_size < MOST_BYTES
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    assert len({c["id"] for c in cells}) == len(cells)
    assert [c["execution_count"] for c in code(document)] == list(range(1, len(code(document)) + 1))
    assert all(c["outputs"] for c in code(document)[1:])
    kinds = {out["output_type"] for c in code(document) for out in c["outputs"]}
    assert kinds <= {"stream", "execute_result", "display_data"}
    assert any(has_image(c) for c in code(document))
    for before, cell in pairwise(cells):
        if cell["cell_type"] == "code" and has_image(cell):
            assert "picture" in "".join(before["source"]), f"{cell['id']} has no text alternative"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_no_logic_and_names_no_machine(path):
    document = read(path)
    for cell in code(document):
        assert logic("".join(cell["source"])) == [], cell["id"]
    for text in texts(document):
        assert not MACHINE.search(text), text
        assert "Traceback" not in text
        assert "Warning" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_in_a_notebook_lead_somewhere(path):
    words = ["".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "markdown"]
    for target in re.findall(r"\]\(([^)#:]+)\)", "\n".join(words)):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "source", ["def f(): pass", "for i in x: y", "z = 1 if a else 2", "f(lambda: 0)", "try: a\nfinally: b"]
)
def test_the_check_for_logic_sees_it(source):
    assert logic(source)
    assert not logic("x = f(1)\nprint(x)")


# --- what runs them -------------------------------------------------------------------------------------


def small(*sources, **changes):
    cells = [
        {"cell_type": "code", "metadata": {}, "source": [s], "outputs": [{"a": 1}], "execution_count": 7}
        for s in sources
    ]
    return {"cells": cells, "metadata": {"who": "me"}, "nbformat": 4, "nbformat_minor": 5} | changes


def test_notebooks_are_chosen_by_how_their_names_begin(tmp_path):
    for name in ("02_b", "01_a", "03_c"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [p.stem for p in runner.chosen(tmp_path, [])] == ["01_a", "02_b", "03_c"]
    assert [p.stem for p in runner.chosen(tmp_path, ["03", "notebooks/01_a.ipynb"])] == ["01_a", "03_c"]
    with pytest.raises(InputError, match="NAME must begin one of 01_a, 02_b, 03_c, got '04'"):
        runner.chosen(tmp_path, ["04"])


def test_a_cleared_notebook_keeps_names_and_nothing_of_a_run():
    document = small("1", "2")
    document["cells"][0] |= {"id": "cell-2", "metadata": {"tags": ["a"], "execution": {"at": "noon"}}}
    found = runner.cleared(document)
    assert [c["id"] for c in found["cells"]] == ["cell-2", "cell-2-b"]
    assert [c["metadata"] for c in found["cells"]] == [{"tags": ["a"]}, {}]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in found["cells"])
    assert found["metadata"] == runner.METADATA
    assert document["cells"][1]["execution_count"] == 7


@pytest.fixture
def kernel():
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")


@pytest.mark.usefixtures("kernel")
def test_outputs_are_kept_only_when_asked_for_and_come_from_this_interpreter(tmp_path, capsys):
    path = tmp_path / "01_a.ipynb"
    path.write_text(json.dumps(small("import sys, os\nprint(sys.executable)", "print(os.getcwd())\n6 * 7")))
    before = path.read_bytes()
    assert runner.main(["01"], tmp_path) == 0
    assert path.read_bytes() == before
    assert re.search(r"01_a: [\d.]+ s", capsys.readouterr().out)
    assert runner.main(["01", "--write"], tmp_path) == 0
    first, second = read(path)["cells"]
    assert "".join(first["outputs"][0]["text"]).strip() == sys.executable
    assert "".join(second["outputs"][0]["text"]).strip() == str(tmp_path)
    assert "".join(second["outputs"][1]["data"]["text/plain"]) == "42"
    assert [c["metadata"] for c in (first, second)] == [{}, {}]
    assert (first["id"], second["id"], second["execution_count"]) == ("cell-1", "cell-2", 2)
    written = path.read_bytes()
    assert runner.main(["01", "--write"], tmp_path) == 0
    assert path.read_bytes() == written


@pytest.mark.usefixtures("kernel")
def test_a_cell_that_fails_ends_the_run_with_its_error(tmp_path, capsys):
    (tmp_path / "01_bad.ipynb").write_text(json.dumps(small("x = 1", "x / 0")))
    (tmp_path / "02_good.ipynb").write_text(json.dumps(small("1")))
    before = (tmp_path / "01_bad.ipynb").read_bytes()
    assert runner.main(["--write"], tmp_path) == 1
    said = capsys.readouterr()
    assert "01_bad failed" in said.err
    assert "ZeroDivisionError: division by zero" in said.err
    assert "\x1b" not in said.err
    assert "02_good" not in said.out
    assert (tmp_path / "01_bad.ipynb").read_bytes() == before


def test_a_name_that_is_not_there_is_refused_in_a_sentence(capsys, kernel):
    assert runner.main(["99"]) == 2
    assert "got '99'" in capsys.readouterr().err


@pytest.mark.usefixtures("kernel")
def test_the_cheapest_notebook_runs_and_finds_the_repository(tmp_path):
    path = FOLDER / f"{CHEAPEST}.ipynb"
    before = path.read_bytes()
    command = [sys.executable, str(FOLDER / "run.py"), CHEAPEST]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{CHEAPEST}: ")
    assert path.read_bytes() == before


# --- what draws and prints for them ---------------------------------------------------------------------

DATA = Dataset("few", tiny_examples(20), None, 4)


def scene(attack="idlg:restarts=1,steps=60", **changes):
    return Scene(attack=attack, data=DATA, model=tiny_model(), **changes)


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    return {
        "open": audit(scene(victims=2)),
        "clipped": audit(
            scene("idlg:restarts=1,steps=60,adapt=true", victims=2, defenses=("clip:norm=0.1",))
        ),
    }


def size(picture):
    with Image.open(BytesIO(picture._repr_png_())) as image:
        return image.size


def test_the_root_is_found_from_below_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(FOLDER)
    notebook.at_root()
    notebook.at_root()
    assert Path.cwd() == ROOT
    assert sys.path.count(str(ROOT / "benchmarks")) >= 1
    with pytest.raises(InputError, match="start must be a folder inside"):
        notebook.at_root(tmp_path)


def test_commands_are_named_once_and_in_order():
    found = notebook.made_by([{"command": "b"}, {"command": "a"}, {"command": "b"}])
    assert found == "made by: b\nmade by: a"


def test_results_are_compared_with_intervals_where_there_are_several(results):
    header, _, first, second = notebook.compare(results).splitlines()
    metrics = results["open"].report["metrics"]
    low, high = metrics["psnr_db"]["ci95"]
    assert "above 30 dB" in header
    assert f"{metrics['psnr_db']['mean']:.1f} [{low:.1f}, {high:.1f}]" in first
    assert f"{metrics['psnr_gain_db']['mean']:+.1f}" in first
    assert "idlg, adaptive" in second
    single = audit(scene("isolation:inner=idlg", clients=6, defenses=("secagg",)))
    table, why = notebook.compare({"lied to": single}).split("\n\n")
    assert "[" not in table
    assert why.startswith("lied to: client 0 had its round given up")


def test_a_line_up_refuses_different_private_images(results):
    picture = notebook.lineup(results, "in words")
    assert repr(picture) == "in words"
    assert size(picture)[1] > size(notebook.lineup({"open": results["open"]}, ""))[1]
    one = notebook.lineup({"open": audit(scene())}, "")
    assert size(one)[0] > size(one)[1]
    other = audit(scene(victims=2, seed=1))
    with pytest.raises(InputError, match="results must be of the same private images, got open, other"):
        notebook.lineup({"open": results["open"], "other": other}, "")


def test_a_saved_figure_is_shown_at_the_resolution_of_a_screen():
    evaluated = [(1, Evaluation(5, 10, 1.0)), (2, Evaluation(8, 10, 0.5))]
    picture = notebook.drawn(accuracy_figure, "a curve", evaluated=evaluated, title="t")
    assert abs(size(picture)[0] - 6.4 * notebook.DPI) < 6
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert len(picture._repr_png_()) < 60_000


def test_numbers_of_two_rows_are_drawn_below_each_other():
    rng = np.random.default_rng(0)
    one = notebook.numbers({"a": torch.zeros(7)}, "")
    two = notebook.numbers({"a": torch.zeros(7), "b": rng.integers(0, 9, 9000)}, "")
    assert size(two)[1] > 1.8 * size(one)[1]


def test_training_gives_a_curve_and_the_round_that_reached_the_target():
    found = notebook.trained(Recipe(clients=20, lr=1.0), 6)
    assert [n for n, _ in found] == [1, 2, 3, 4, 5, 6]
    first = next(n for n, e in found if e.accuracy >= 0.5)
    header, _, line, other = notebook.accuracies({"a": found, "b": found[:1]}, 0.5).splitlines()
    assert header.endswith("first at 50%")
    assert line.split()[-1] == str(first)
    assert f"{found[-1][1].accuracy:.3f}" in line
    assert other.endswith("not reached")
    assert size(notebook.curves({"a": found}, "", target=0.5))[0] > 500
    with pytest.raises(InputError, match="rounds must be >= 1, got 0"):
        notebook.trained(Recipe(), 0)
