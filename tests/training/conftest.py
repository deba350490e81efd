"""Small runs, and what they share."""

from __future__ import annotations

import json

import pytest

from tests.small_runs import (
    compiled_anew as compiled_anew,
)
from tests.small_runs import (
    compiled_once as compiled_once,
)
from tests.small_runs import (
    configure as configure,
)
from tests.small_runs import (
    plotted as plotted,
)
from tests.small_runs import (
    programs as programs,
)
from tests.small_runs import (
    promotion as promotion,
)
from tests.small_runs import (
    shared_programs as shared_programs,
)
from tests.small_runs import (
    unplotted as unplotted,
)


@pytest.fixture(scope="session")
def token_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows with texts that may become tokens."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n} ->", "completion": f" <place> {n} <end>"} for n in range(16)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)
