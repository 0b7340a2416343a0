"""Keeps the pages right in the site as they are on a code host.

A page may link to anything in the repository. What lies outside `docs/` goes into the site under `files/`,
a folder as a page that lists its files; the README is the site's first page. A line `<!-- every attack -->`
or `<!-- every defense -->` becomes one reference entry for each row of that table.
"""

from __future__ import annotations

import re
import runpy
from os.path import normpath, relpath
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()[^)\s#:]+(?=[)#])")
EVERY = re.compile(r"^<!-- every (attack|defense) -->$", re.MULTILINE)
HOME = {"README.md": "index.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside `docs/`."""
    pages = list(files.documentation_pages())
    for page in pages:
        for link in LINK.findall(page.content_string):
            source = _outside(page.src_uri, link, config)
            if source is not None:
                _add(source, files, config)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Point links to where `on_files` has put what they lead to, and write out the tables."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        source = _outside(here, match[0], config)
        return match[0] if source is None else relpath(_place(source, config), Path(here).parent)

    return EVERY.sub(lambda match: _entries(match[1], config), LINK.sub(moved, markdown))


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _outside(page: str, link: str, config: MkDocsConfig) -> Path | None:
    """What `link` leads to, where that is something the site has no page or file for by itself."""
    target = Path(normpath(Path(config.docs_dir, page).parent / link))
    if not target.is_relative_to(_root(config)) or not target.exists():
        return None
    return target if target.is_dir() or not target.is_relative_to(config.docs_dir) else None


def _place(source: Path, config: MkDocsConfig) -> str:
    """Where in the site `source` is, as a path from its root."""
    name = source.relative_to(_root(config)).as_posix()
    return HOME.get(name, f"files/{name}/index.md" if source.is_dir() else f"files/{name}")


def _add(source: Path, files: Files, config: MkDocsConfig) -> None:
    uri = _place(source, config)
    if files.get_file_from_path(uri) is not None:
        return
    if not source.is_dir():
        files.append(File.generated(config, uri, abs_src_path=str(source)))
        return
    held = sorted(f for f in source.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    files.append(File.generated(config, uri, content=_listing(source, held, config)))
    for file in held:
        _add(file, files, config)


def _listing(folder: Path, held: list[Path], config: MkDocsConfig) -> str:
    rows = "\n".join(f"- [{(n := f.relative_to(folder).as_posix())}]({n})" for f in held)
    return f"# {folder.name}\n\nThe files of `{folder.relative_to(_root(config)).as_posix()}`.\n\n{rows}\n"


def _entries(kind: str, config: MkDocsConfig) -> str:
    """A reference entry for each row of the table of attacks or defenses: the module, and its class."""
    table = runpy.run_path(str(_root(config) / f"{kind}s" / "__init__.py"))[f"{kind.upper()}S"]
    entries = []
    for name, target in table.items():
        module, cls = target.split(":")
        options = f"{{heading: {name}, toc_label: {name}, members: [{cls}]}}"
        entries.append(f"::: {module}\n    options: {options}\n")
    return "\n".join(entries)
