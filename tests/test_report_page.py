"""The page of a trade-off run: what it says is what the run holds, and a browser can use it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from copy import deepcopy
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fltoolkit.commands.report import ReportOptions, run_report
from fltoolkit.errors import InputError
from fltoolkit.report.page import chart, facts, labels, made, numbers, page, pictures, points, scales
from fltoolkit.report.page.scales import EpsilonScale
from fltoolkit.tradeoff.grid import grid_of

SAMPLE = Path(__file__).parent / "samples" / "tradeoff_run.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
QUIET += ("--disable-sync", "--no-first-run")
VOID = {"meta", "link", "br", "img", "wbr", "input", "hr"}


class Reader(HTMLParser):
    """Table cells by row and key, ids, links, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.ids, self.links, self.images, self.open = {}, [], [], [], []
        self.tags = set()
        self.row = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        if tag == "img":
            self.images.append(found)
        if tag == "tr":
            self.row = found.get("id")
        if tag == "td":
            self.rows.setdefault(self.row, {})[found["data-key"]] = found["data-value"]

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def run():
    return json.loads(SAMPLE.read_text(encoding="utf-8"))


def words_of(text):
    """What a reader sees of some HTML."""
    return " ".join(unescape(re.sub(r"<wbr>", "", re.sub(r"<(?!wbr)[^>]*>", " ", text))).split())


def test_every_point_is_there_with_its_label(run):
    text = page(run)
    for i, p in enumerate(run["points"]):
        row = text[text.index(f'id="row-{i}"') :]
        assert p["label"] in words_of(row[: row.index("</tr>")])
        assert f'id="point-{i}"' in text


def test_numbers_of_the_table_are_those_of_the_run(run):
    rows = Reader(page(run)).rows
    assert len(rows) == len(run["points"])
    for i, p in enumerate(run["points"]):
        cells = rows[f"row-{i}"]
        assert cells["threat"] == p["threat"]
        assert cells["strongest"] == p["strongest"]["attack"]
        assert float(cells["bytes"]) == p["bytes"]["up"]
        for key, name in (
            ("accuracy", "accuracy"),
            ("leak", "leak_db"),
            ("gain", "gain_db"),
            ("ssim", "ssim"),
        ):
            assert float(cells[key]) == p[name]["mean"]
        assert float(cells["labels"]) == p["label_accuracy"]["mean"]
        assert float(cells["success"]) == p["success_rate"]["value"]
        assert float(cells["seconds"]) == p["seconds"]["mean"]
        e = p["epsilon"]["value"]
        assert float(cells["epsilon"]) == (float("inf") if e is None else e)


def test_a_cell_shows_percent_and_interval(run):
    p = run["points"][3]
    p["accuracy"] = {"mean": 0.8125, "ci95": [0.8, 0.825], "values": [0.8, 0.825]}
    text = page(run)
    assert re.search(r'data-key="accuracy" data-value="0.8125">81.2<small>\[80.0, 82.5\]</small>', text)


def test_loss_is_paired_by_seed():
    none = {"stack": [], "accuracy": {"mean": 0.9, "values": [0.88, 0.90, 0.92]}}
    point = {"stack": ["clip"], "accuracy": {"mean": 0.8, "values": [0.78, 0.80, 0.82]}}
    mean, ci = points.loss(point, none)
    assert mean == pytest.approx(10)
    assert ci == pytest.approx([10, 10])
    assert points.loss(none, none) == (0, None)
    assert points.loss(point, None) == (None, None)


def test_names_are_escaped(run):
    bad = "<script>alert(1)</script>\"'&"
    for p in run["points"]:
        if p["defense"] == "clip":
            p["defense"], p["label"] = bad, bad
    for r in run["pictures"]["recovered"]:
        r["defense"] = bad if r["defense"] == "clip" else r["defense"]
    run["note"] = run["command"] = run["grid"]["federation"]["data"] = bad
    run["threats"][0]["about"] = run["versions"]["torch"] = bad
    text = page(run)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert not Reader(text).open


def test_nothing_outside_is_asked_for(run):
    text = page(run)
    assert not re.search(r"""(src|href|action|poster|data)\s*=\s*["']?\s*(https?:)?//""", text)
    assert not re.search(r"url\(\s*[\"']?(?!data:)|@import|fetch\(|XMLHttpRequest|WebSocket", text)
    assert "default-src 'none'" in text
    for image in Reader(text).images:
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"]


def test_links_lead_to_ids_and_ids_are_unique(run):
    read = Reader(page(run))
    assert len(set(read.ids)) == len(read.ids)
    assert len(read.links) > len(run["points"])
    for link in read.links:
        assert link.startswith("#")
        assert link[1:] in read.ids
    assert {"main", "nav", "header", "footer", "h1", "table", "svg"} <= read.tags
    assert not read.open


def test_findings_are_those_of_the_points(run):
    said = [words_of(s) for s in facts.says(run, "server").sentences]
    quiet = [
        p for p in run["points"] if p["threat"] == "server" and p["pareto"] and p["leak_db"]["mean"] < 20
    ]
    best = max(quiet, key=lambda p: p["accuracy"]["mean"])
    assert any(f"{best['leak_db']['mean']:.1f} dB" in s and points.short(run, best) in s for s in said)
    assert any("of the attacks tried" in s for s in said)
    assert any(s.startswith("3 of 12 points have a finite ε") for s in said)
    for p in run["points"]:
        p["leak_db"]["mean"] += 20
    assert any("No defense tried keeps" in words_of(s) for s in facts.says(run, "server").sentences)
    for p in run["points"]:
        p["epsilon"]["value"] = None
    assert "No point has a finite ε" in facts.says(run, "server").sentences[-1]


def test_findings_without_need_of_a_defense_say_so(run):
    (said,) = [s for s in facts.says(run, "aggregate").sentences if "below" in s]
    assert "without any defense: 15.6 dB" in words_of(said)
    assert "best guess without an update has 13.1 dB" in words_of(said)
    for p in run["points"]:
        p["stack"] = p["stack"] or ["x"]
    assert "with the least loss" in "".join(facts.says(run, "aggregate").sentences)


def test_short_names_say_what_differs(run):
    names = {p["label"]: points.short(run, p) for p in run["points"]}
    assert names["none"] == "none"
    assert names["clip:norm=0.3"] == "clip, norm=0.3"
    both = "clip:norm=0.3 + gaussian:noise_multiplier=0.5,placement="
    assert names[both + "server"] == "central DP, noise_multiplier=0.5"


def test_a_point_without_attack_has_a_row_and_no_mark(run):
    p = run["points"][-1]
    for name in ("gain_db", "ssim", "label_accuracy", "success_rate"):
        del p[name]
    p |= {"leak_db": None, "strongest": None, "pareto": False}
    run["pictures"] = {"recovered": []}
    run["failed"] = [{"defense": "x", "strength": 0, "label": "x", "stack": ["x"], "reason": "not finite"}]
    text = page(run)
    last = len(run["points"]) - 1
    assert f'id="row-{last}"' in text
    assert f'id="point-{last}"' not in text
    assert "Not drawn, as no attack could be run" in text
    assert "not finite" in text
    assert not Reader(text).open


def test_one_seed_and_one_victim_have_no_intervals(run):
    for p in run["points"]:
        for name in ("accuracy", "leak_db", "gain_db", "ssim", "label_accuracy", "seconds"):
            p[name]["ci95"] = None
        p["accuracy"]["values"] = p["accuracy"]["values"][:1]
        p["epsilon"]["value"] = None
    text = page(run)
    assert 'class="bars"' not in text
    assert 'class="ramp"' not in text


def test_private_images_may_stand_beside_each_recovered_one(run):
    apart = pictures.groups(run)
    inside = deepcopy(run)
    victims = inside["pictures"].pop("victims")
    for entry in inside["pictures"]["recovered"]:
        for image, victim in zip(entry["images"], victims, strict=True):
            image["truth"] = victim["png"]
    assert pictures.groups(inside) == apart
    assert [g.threat for g in apart] == ["server", "aggregate"]
    assert all(image.tiny for g in apart for s in g.strips for image in s.images)
    inside["pictures"]["recovered"][0]["images"][0]["truth"] = victims[1]["png"]
    assert len(pictures.groups(inside)) == 3


def test_the_question_as_a_file_is_the_question(run):
    assert grid_of(tomllib.loads(made.as_toml(run))).plain() == run["grid"]


def test_epsilon_colours_are_ordered_on_a_log_axis():
    scale = scales.EpsilonScale.over([None, 0.5, 30])
    assert scale.decades == pytest.approx([0.1, 1, 10, 100])
    assert scale.place(1) == pytest.approx(1 / 3)
    assert (scale.colour(0.1), scale.colour(100)) == (scales.VIRIDIS[0], scales.VIRIDIS[-1])
    colours = [scale.colour(10 ** (-1 + 3 * i / 60)) for i in range(61)]
    light = [_lightness(c) for c in colours]
    assert light == sorted(light)
    assert len(set(light)) > 50
    assert scales.EpsilonScale.over([None]) is None


def _lightness(colour):
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_axes_are_shared_and_hold_every_mean(run):
    frame = chart.frame(run)
    for p in run["points"]:
        assert frame.x.low <= p["leak_db"]["mean"] <= frame.x.high
        assert frame.y.low <= 100 * p["accuracy"]["mean"] <= frame.y.high
    assert frame.x(frame.x.low) == chart.LEFT
    assert frame.y(frame.y.high) == chart.TOP
    assert len(frame.x.ticks) <= 9


def test_labels_do_not_cover_points_or_each_other():
    curves = [(f"defense {i}", [(60.0 + 60 * (i % 5), 80.0 + 55 * (i // 5))]) for i in range(20)]
    marks = [labels.around(x, y, 8) for _, line in curves for x, y in line]
    frame = labels.Box(0, 0, 440, 340)
    boxes = []
    for label in labels.place(curves, marks, [], frame):
        wide = labels.WIDTH * labels.SIZE * len(label.text) / 2
        box = labels.Box(label.x - wide, label.y - 6, label.x + wide, label.y + 6)
        assert box.outside(frame) == pytest.approx(0)
        assert sum(box.overlap(b) for b in (*marks, *boxes)) < 40
        boxes.append(box)


def test_command_writes_beside_the_run_or_where_told(tmp_path, capsys, run):
    source = tmp_path / "run.json"
    source.write_text(json.dumps(run), encoding="utf-8")
    assert run_report(str(tmp_path), ReportOptions()) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    elsewhere = tmp_path / "new" / "page.html"
    assert run_report(str(source), ReportOptions(out=str(elsewhere))) == 0
    assert elsewhere.read_text(encoding="utf-8") == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "report.html", "run.json"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "run must be a folder with a run.json"),
        ("{", "run must be JSON"),
        ("[1]", "run must have the schema 'fltoolkit.tradeoff/1', got None"),
        ('{"schema": "fltoolkit.audit/1"}', "got 'fltoolkit.audit/1'"),
        ('{"schema": "fltoolkit.tradeoff/1"}', "run must hold 'grid', got none in"),
    ],
)
def test_bad_runs_end_in_one_sentence(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(expected)):
        run_report(str(tmp_path), ReportOptions())
    assert not (tmp_path / "report.html").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path, run):
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="out must be a file that can be written"):
        run_report(str(tmp_path), ReportOptions(out=str(tmp_path / "file" / "page.html")))


def browser_path():
    named = os.environ.get("FLTOOLKIT_CHROMIUM")
    return named or next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.fixture
def opened(tmp_path):
    """The page in a browser, and everything that it asked for or complained about."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if browser_path() is None:
        pytest.skip("no Chromium here")
    target = tmp_path / "report.html"
    run_report(str(SAMPLE), ReportOptions(out=str(target)))
    trouble = []
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=browser_path(), args=list(QUIET))
        try:
            tab = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
            tab.on("console", lambda m: trouble.append(m.text))
            tab.on("pageerror", lambda e: trouble.append(str(e)))
            tab.on("request", lambda r: _note_request(r.url, trouble))
            tab.goto(target.as_uri())
            yield tab
        finally:
            browser.close()
    assert not trouble


def _note_request(url, trouble):
    if not url.startswith(("file:", "data:")):
        trouble.append(url)


def test_in_a_browser(opened, run):
    _chart(opened, run)
    _rows_and_points(opened)
    _sorting_and_filter(opened, run)
    _colours(opened)
    _widths_and_print(opened)


def _chart(tab, run):
    assert tab.locator("svg.panel").count() == len(run["threats"])
    assert tab.locator("svg.panel a.point").count() == len(run["points"])
    assert tab.evaluate(
        "[...document.querySelectorAll('a.point')].every(p => (p.focus(), p.matches(':focus')))"
    )
    names = tab.eval_on_selector_all("a.point", "all => all.map(a => a.getAttribute('aria-label'))")
    assert all("accuracy" in n and "leak" in n and "ε" in n for n in names)
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").is_hidden()
    tab.evaluate("document.activeElement.blur()")
    tab.locator("#point-0").hover()
    assert tab.locator("#tip").is_visible()
    assert f"{run['points'][0]['leak_db']['mean']:.1f} dB" in tab.locator("#tip").inner_text()
    tab.mouse.move(2, 2)
    tab.locator("#tip").wait_for(state="hidden")
    tab.locator("#point-0").focus()
    before = tab.locator("#tip").inner_text()
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("document.activeElement.id") != "point-0"
    assert tab.locator("#tip").inner_text() != before
    tab.keyboard.press("Tab")
    assert tab.locator("#tip").is_visible()
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").is_hidden()


def _rows_and_points(tab):
    tab.locator("#point-0").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.activeElement.id === 'row-0'")
    assert tab.locator("tr.chosen").get_attribute("id") == "row-0"
    tab.locator("#row-0 a.back").click()
    tab.wait_for_function("document.activeElement.id === 'point-0'")
    assert tab.locator("#tip").is_visible()
    tab.keyboard.press("Escape")
    missing = tab.evaluate(
        "[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"
        ".filter(h => !h.startsWith('#') || !document.getElementById(h.slice(1)))"
    )
    assert missing == []


def _sorting_and_filter(tab, run):
    leaks = "[...document.querySelectorAll('td[data-key=leak]')].map(c => Number(c.dataset.value))"
    expected = sorted(p["leak_db"]["mean"] for p in run["points"])
    head = tab.locator("thead th").nth(4)
    for direction, values in (("ascending", expected), ("descending", expected[::-1])):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        assert tab.evaluate(leaks) == values
    assert tab.locator("[aria-sort]").count() == 1
    tab.get_by_role("button", name="aggregate", exact=True).click()
    shown = sum(p["threat"] == "aggregate" for p in run["points"])
    assert tab.locator("tbody tr:visible").count() == shown
    assert tab.locator("#count").inner_text() == f"{shown} of {len(run['points'])} lines"
    tab.locator("#point-0").click()
    assert tab.locator("#row-0").is_visible()


def _colours(tab):
    background = "getComputedStyle(document.body).backgroundColor"
    before = tab.evaluate(background)
    tab.locator("#theme").click()
    assert tab.evaluate(background) != before
    tab.locator("#theme").click()
    assert tab.evaluate(background) == before
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(background) == before
    assert tab.evaluate("delete document.documentElement.dataset.theme") is True
    assert tab.evaluate(background) != before


def _widths_and_print(tab):
    for width in (375, 768, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), width
    tab.emulate_media(media="print", color_scheme="dark")
    for control in ("#theme", ".filter", ".bar", ".skip", "#tip"):
        assert tab.locator(control).is_hidden()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.set_viewport_size({"width": 1030, "height": 700})
    assert tab.evaluate(
        "document.querySelector('table').offsetWidth <= document.querySelector('.scroll').offsetWidth"
    )


def test_names_of_powers_of_ten_fit_beside_each_other():
    assert [numbers.power_of_ten(v) for v in (1e-2, 1.0, 1e4, 1e5, 1e8, 1e-5)] == [
        *("0.01", "1", "10000", "10⁵", "10⁸", "10⁻⁵")
    ]
    for high in (1e1, 1e3, 1e6, 1e9, 1e12):
        found = EpsilonScale(1.0, high).decades
        assert found[0] == 1.0
        assert len(found) <= 7
        assert found[-1] <= high


@pytest.mark.parametrize("name", ["default", "privacy"])
def test_committed_runs_have_a_page_that_names_every_point(name):
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "tradeoff" / name / "run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    text = page(run)
    assert text.count('class="marker"') == len(run["points"])
    for point in run["points"]:
        assert all(spec.partition(":")[0] in text for spec in point["stack"])
