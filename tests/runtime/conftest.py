"""The hub's stand-in, and its client pointed at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxft.runtime import hub as client

from .stand_in import Hub


@pytest.fixture
def fresh() -> Callable[[], None]:
    """`fresh()` forgets what this process knows of the hub, as another process would begin."""

    def forget() -> None:
        client._folder_of.cache_clear()
        client._tell.cache_clear()

    return forget


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Callable[[], None]
) -> Iterator[Hub]:
    """An empty hub, a cache of its own, and a folder with nothing in it to stand in."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fresh()
    yield server
    server.close()
    fresh()
