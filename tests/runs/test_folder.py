"""A run's folder is recognised by its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxft.configuration import load_config, to_json
from jaxft.errors import UserError
from jaxft.runs.folder import check_folder


def written_without(folder: Path, config: Any, key: str) -> None:
    """config.json as a jaxft that did not know a key yet wrote it."""
    values = json.loads(to_json(config))
    del values[key]
    (folder / "config.json").write_text(json.dumps(values))


def test_a_run_of_an_earlier_version_has_the_defaults_of_keys_that_came_since(tmp_path):
    config = load_config("configs/sft.py:lora")
    written_without(tmp_path, config, "eval_rows")
    check_folder(config, tmp_path)


def test_another_value_of_such_a_key_is_another_configuration(tmp_path):
    written_without(tmp_path, load_config("configs/sft.py:lora"), "eval_rows")
    with pytest.raises(UserError, match=r"another configuration.*eval_rows: 64 -> 8"):
        check_folder(load_config("configs/sft.py:lora", {"eval_rows": 8}), tmp_path)
