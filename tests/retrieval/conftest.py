"""A handful of documents, and an index of them, that the tests of jaxft.retrieval share."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxft.data import Tokenizer, load_tokenizer
from jaxft.retrieval import update_index

TEXTS = {
    "pumps.md": "# Pumps\n\nThe red pump was built in 1931. It moves 40 litres a minute.\n\n"
    "# Engines\n\nThe engine of Norrvik is blue. It never stops.\n",
    "bridge.txt": "The bridge of Östby is 212 metres long. It was built by Malin Ferro.",
    "page.html": "<html><head><title>Bakers</title><script>evil()</script></head><body><h1>The "
    "baker</h1><p>The baker &amp; the   miller are <b>Ola</b> Brandt.</p></body></html>",
    "rows.jsonl": '{"id": "tax", "text": "The tax on salt is 3 crowns."}\n'
    '{"text": "The mayor is called Tove."}\n',
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("tiny")


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder "docs" of the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def index(documents: Path) -> Path:
    """The index "INDEX" of the documents."""
    update_index("INDEX", ["docs"], {"tokens": 48})
    return documents.parent / "INDEX"
