"""The tiny tokenizer and files that the tests of jaxft.data share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxft.data import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
collect_ignore_glob = ["golden/*.py"]  # they need the extra `reference`


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of the golden files: BOS <s> before a text, EOS <|im_end|>, pad <pad>."""
    return load_tokenizer(GOLDEN / "tokenizer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tokenizer's folder, to be spoiled."""
    return Path(shutil.copytree(GOLDEN / "tokenizer", tmp_path / "model"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects become JSON, strings and bytes stand as they are), gives the path."""

    def write_rows(*rows: object, name: str = "train.jsonl") -> Path:
        lines = [
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write_rows
