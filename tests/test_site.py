"""The site builds without warnings, leads nowhere wrong, fetches nothing, and its own pages are right."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from attacks import ATTACKS
from defenses import DEFENSES
from fltoolkit import cli, registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = ("index.md", "quick-start.md", "reading-the-numbers.md", "choosing-a-defense.md")
FETCHED = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src"}
OUTSIDE = re.compile(r"^(?:[a-z]+:)?//", re.IGNORECASE)


def text_of(name):
    return (DOCS / name).read_text(encoding="utf-8")


def commands():
    """Every command line of the guides that runs this toolkit, without its continuation marks."""
    found = []
    for name in GUIDES:
        joined = text_of(name).replace("\\\n", " ")
        for line in re.findall(r"^    python -m (.+)$", joined, re.MULTILINE):
            found.append(pytest.param(shlex.split(line), id=line))
    return found


class Page(HTMLParser):
    """What a built page links to (`links`), has fetched (`fetched`), and can be linked at (`ids`)."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.fetched, self.images, self.ids = path, [], [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])
        if tag == "img":
            self.images.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "WARNING" not in said
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def target(page, link, site):
    """The file that a link inside the site leads to, and the place in it."""
    path, _, anchor = link.partition("#")
    start = site if path.startswith("/") else page.path.parent
    found = (start / path.lstrip("/")).resolve() if path else page.path
    return (found / "index.html" if found.is_dir() else found), anchor


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_links_of_the_reference_lead_somewhere():
    for page in (DOCS / "api").glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_example_of_a_report_is_a_committed_result():
    (block,) = re.findall(
        r"<!-- example -->\n```json\n(.*?)```", text_of("reading-the-numbers.md"), re.DOTALL
    )
    shown = json.loads(block)
    cells = json.loads((ROOT / "benchmarks/results/defense_tradeoff.json").read_text(encoding="utf-8"))
    cell = next(c for c in cells if c["curve"] == "none")
    attacks = {name.partition(":")[0]: found for name, found in cell["attacks"].items()}
    found = attacks["idlg"]
    for name, field in {"psnr_db": "psnr_db", "psnr_gain_db": "gain_db"}.items():
        assert shown["metrics"][name] == rounded(found[field], 1)
    assert shown["metrics"]["success_rate"] == rounded(found["success_rate"], 2)
    assert shown["epsilon"] == found["epsilon"]
    others = [f"`{name}` reaches {attacks[name]['psnr_db']['mean']:.1f} dB" for name in ("inverting",)]
    others += [f"`features` {attacks['features']['psnr_db']['mean']:.1f} dB"]
    for said in others:
        assert said in text_of("reading-the-numbers.md")


def rounded(value, digits):
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, list) else round(value, digits)


def test_the_quick_starts_python_does_what_its_comment_says(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", text_of("quick-start.md"), re.DOTALL)
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script))
    label, apart = re.fullmatch(r"tensor\(\[(\d)\]\) tensor\((.+?)\)\s*", capsys.readouterr().out).groups()
    assert label == "7"
    assert float(apart) < 0.05


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_guides_are_accepted(command, monkeypatch):
    monkeypatch.setattr(cli, "guarded", lambda run: 0)
    program, *flags = command
    if program == "fltoolkit":
        assert cli.main(flags) == 0
    else:
        with pytest.raises(SystemExit) as end:
            cli.attack_main(program.removeprefix("attacks."), flags)
        assert end.value.code == 0
    registry.make_stack([flags[i + 1] for i, flag in enumerate(flags) if flag == "--defense"])


def test_every_attack_and_defense_is_in_the_reference(site):
    for name, table in {"attacks": ATTACKS, "defenses": DEFENSES}.items():
        page = Page(site / "api" / f"{name}.html")
        shown = page.path.read_text(encoding="utf-8")
        for called, where in table.items():
            assert where.replace(":", ".") in page.ids
            assert re.search(
                rf'<h2 id="{where.partition(":")[0]}"[^>]*>.*?\b{called}\b.*?</h2>', shown, re.DOTALL
            )


def test_links_of_the_site_lead_somewhere(site, pages):
    inside = 0
    for page in pages.values():
        for link in page.links:
            if OUTSIDE.match(link) or link.startswith("mailto:"):
                continue
            found, anchor = target(page, link, site)
            inside += 1
            assert found.exists(), f"{page.path.relative_to(site)} links to {link}"
            assert found.is_relative_to(site.resolve())
            known = pages.get(site / found.relative_to(site.resolve()))
            if anchor and known is not None and anchor != "__skip":
                assert anchor in known.ids, f"{page.path.relative_to(site)} links to {link}"
    assert inside > 1000


def test_the_site_fetches_nothing_from_elsewhere(site, pages):
    for page in pages.values():
        for address in page.fetched:
            assert not OUTSIDE.match(address), f"{page.path.relative_to(site)} fetches {address}"
            assert target(page, address.partition("?")[0], site)[0].exists(), address
    for sheet in site.rglob("*.css"):
        css = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(?:url\(\s*[\"']?|@import\s+[\"'])(?:https?:)?//", css), sheet.name


def test_the_pictures_of_every_page_are_there(site):
    for source in DOCS.glob("*.md"):
        page = Page(site / f"{source.stem}.html")
        assert len(page.images) == len(re.findall(r"^!\[", source.read_text(encoding="utf-8"), re.MULTILINE))
        for address in page.images:
            assert target(page, address, site)[0].stat().st_size > 1000, f"{source.name}: {address}"
    assert Page(site / "index.html").images == ["demo.png"]


def test_what_pages_link_to_outside_is_part_of_the_site(site):
    links = Page(site / "inversion.html").links
    assert "files/benchmarks/results/inversion/index.html" in links
    listed = [
        x for x in Page(site / "files/benchmarks/results/inversion/index.html").links if x.endswith("json")
    ]
    assert len(set(listed)) == len(list((ROOT / "benchmarks/results/inversion").iterdir()))
