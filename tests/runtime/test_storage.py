"""Where a folder stands, and what is said where it cannot be reached. In a store: tests/training/test_remote.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.runtime import storage


def test_a_name_is_a_path_of_this_machine(tmp_path: Path) -> None:
    """Whatever is no URL."""
    assert storage.place("runs/a:b") == Path("runs/a:b")
    assert storage.fetched(tmp_path) == tmp_path
    assert isinstance(storage.place(tmp_path), type(tmp_path))


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_package_that_is_missing_is_named(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, with what installs it; so does the command before it reads anything."""
    from etils.epath.backend import fsspec_backend

    fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setenv("EPATH_USE_TF", "false")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as told:
        storage.place(f"{scheme}://bucket/run")
    assert str(told.value) == (
        f"{scheme}://bucket/run: {scheme}:// needs the package {package}, which is not installed: "
        f"pip install 'jaxft[{scheme}]'"
    )


def test_another_kind_of_url_is_refused() -> None:
    """With the nearest, or all."""
    with pytest.raises(
        UserError, match=r"g3://b/run: no such kind of storage: g3:// \(nearest: 's3', 'gs'\)"
    ):
        storage.place("g3://b/run")
    with pytest.raises(UserError, match="there are: gs://, s3://"):
        storage.place("https://example.org/run")


def test_models_and_outputs_stand_on_a_file_system(tmp_path: Path) -> None:
    """One line says what to do; nothing is made under a name that looks like the URL."""
    with pytest.raises(UserError, match="gs://b/model: a model stands on a file system: copy it"):
        jaxft.load("gs://b/model")
    model, params = jaxft.load("tiny")
    with pytest.raises(UserError, match="gs://b/out: a model that is written stands on a file"):
        jaxft.save(model, params, "gs://b/out")
    with pytest.raises(UserError, match="gs://b/out: an adapter that is written stands on a file"):
        jaxft.save_adapter(params, "gs://b/out")
    assert not Path("gs:").exists()


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stood there stays until the new one is complete."""
    storage.write_text(tmp_path / "a", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        storage.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_files_are_named_from_their_folder_on(tmp_path: Path) -> None:
    """Folders are none."""
    for name in ("b", "c/d", "c/a/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(storage.files_under(tmp_path)) == ["b", "c/a/e", "c/d"]
