"""The docs site builds without a warning, holds what it should, and asks no network for anything."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from burnish.cli.main import COMMANDS
from burnish.cli.parser import Group

pytest.importorskip("material", reason="mkdocs-material is missing: pip install 'burnish[docs]'")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is missing: pip install 'burnish[docs]'")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Strict: a link, an anchor or a name that leads nowhere fails it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    yield target
    shutil.rmtree(target)


class Asked(HTMLParser):
    """What a browser fetches of itself when it opens a page."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.found.append(given.get("href") or "")


def test_every_page_is_there_and_asks_nobody(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert [page for page in pages if not (site / page).is_file()] == []
    for page in pages:
        for asked in Asked((site / page).read_text()).found:
            assert not re.match(r"(https?:)?//", asked), f"{page} asks for {asked}"
            assert not asked or (site / page).parent.joinpath(asked.partition("?")[0]).is_file(), f"{page}: {asked}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text()), sheet.name


def names(group: Group = COMMANDS, name: str = "burnish"):
    for word, found in group.commands.items():
        yield from names(found, f"{name} {word}") if isinstance(found, Group) else [f"{name} {word}"]


def test_what_is_made_of_the_code_is_in_it(site):
    commands = (site / "reference/commands.html").read_text()
    assert [name for name in names() if f"usage: {name}" not in commands] == []
    recipes = (site / "reference/recipes.html").read_text()
    assert all(f"<code>{name}</code>" in recipes for name in ("train.peft.rank", "data.held_out", "eval.delay.mode"))
    assert 'id="burnish.evaluate.stats.wilson"' in (site / "reference/python.html").read_text()
    assert "<!-- made:" not in commands + recipes + (site / "examples.html").read_text()
    declared = [path for path in (ROOT / "results").glob("*/*.json") if "declared" in json.loads(path.read_text())]
    assert len(list((site / "img/studies").glob("*.svg"))) == len(declared) >= 1


def test_it_can_be_searched_and_darkened(site):
    index = json.loads((site / "search/search_index.json").read_text())
    assert {"reference/options.html", "ask/jerks.html"} <= {one["location"].split("#")[0] for one in index["docs"]}
    front = (site / "index.html").read_text()
    assert front.count('name="__palette"') == 3 and "fonts.g" not in front
