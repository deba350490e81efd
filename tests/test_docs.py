"""README and the guides in docs/: their links lead somewhere, their commands and keys exist."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxft import cli
from jaxft.configuration import load_config
from jaxft.configuration.keys import flatten

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The words behind `jaxft` of each command in a page's shell blocks, its variables set."""
    for block in re.findall(r"^```(?:sh|bash)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        joined = re.sub(r"\$\(\(.*?\)\)|\$\w+", "4", block.replace("\\\n", " "))
        for line in joined.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].rpartition("/")[2] == "jaxft":
                yield words[1:]


def anchors(page: Path) -> set[str]:
    """What a link may name behind #, as GitHub makes it of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text()))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_guide_is_named_in_the_readme():
    readme = PAGES[0].read_text()
    assert all(f"(docs/{page.name}" in readme for page in PAGES if page.parent.name == "docs")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_taken(page, monkeypatch):
    def run(config="configs/sft.py", overrides=(), **_):
        taken.append(load_config(config, overrides))

    for verb in cli.VERBS:
        monkeypatch.setattr(importlib.import_module(f"jaxft.commands.{verb}"), "run", run)
    monkeypatch.chdir(ROOT)
    taken: list[object] = []
    given = list(commands(page.read_text()))
    for words in given:
        assert cli.main(words) == 0, words
    assert len(taken) == len(given)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_keys_exist(page):
    """Keys in a line's code, as `data.packing=True`, stand in one of the recipes; `data.fields` takes any."""
    recipes = [load_config(f"configs/{name}:lora") for name in ("sft.py", "dpo.py", "rl.py")]
    known = {key for recipe in recipes for key in flatten(recipe)}
    groups = {key.partition(".")[0] for key in known if "." in key}
    for key in re.findall(r"`(?:--config\.)?([a-z_]+\.[a-z_.]+)=", CODE.sub("", page.read_text())):
        if key.partition(".")[0] in groups and not key.startswith("data.fields."):
            assert any(one == key or one.startswith(f"{key}.") for one in known), key
